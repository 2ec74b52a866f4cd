"""how stored bytes are shown."""
