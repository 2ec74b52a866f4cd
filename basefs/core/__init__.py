"""pure: no trio, no files, no clock, no logging."""
