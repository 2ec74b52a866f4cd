"""What the demo, the tests and the benchmarks share: real services, a real guest. Standard library only."""
