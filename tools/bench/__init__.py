"""What basefs must reach, measured on this machine in one run: `make bench`, or `make bench-NAME` for one part."""
