"""What a compute node goes through in a year, in half an hour: `make soak`; the parts are used by tests/faults, too."""
