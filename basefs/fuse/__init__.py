"""the FUSE face: the only folder beside service that knows pyfuse3 and errno."""
