"""The server: builds the objects, opens the service nursery, speaks to the keeper and to the kernel."""
