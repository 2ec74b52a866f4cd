"""where bytes come from."""
