"""The server: builds the objects, opens the service nursery, speaks to the keeper and to the kernel."""

import gc

# Until everything stands (`server.py` turns it on): the collector walked all modules again and again while they were
# imported, for a tenth of the time to start.
gc.disable()
