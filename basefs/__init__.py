"""basefs: every Glance image is a file in nova's _base at once; its bytes come when they are read."""
