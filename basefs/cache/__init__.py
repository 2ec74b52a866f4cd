"""what is here, and what brings the rest."""
