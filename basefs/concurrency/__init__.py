"""Single flight, the one door to threads, and blocking HTTP that can be cancelled."""
