"""which images Glance has, and which may be shown."""
