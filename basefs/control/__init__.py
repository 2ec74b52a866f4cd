"""the Unix socket by which the commands reach the server."""
