"""single flight and the one door to threads."""
