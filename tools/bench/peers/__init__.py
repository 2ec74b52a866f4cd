"""basefs beside what an operator would pick instead: the same work on the same bytes over the same links.

`make bench-peers`. A *peer* (`base.py`, one module each) brings a disk's bytes to a path or a guest's drive; a *work*
(`work_*.py`) measures every peer by turns; a *site* (`site.py`) is Glance and a web server with the same images, seen
through a *link* (`link.py`). Measurements are plain records (`record.py`), kept as JSON; table, bounds and plot are
made of those only.
"""
