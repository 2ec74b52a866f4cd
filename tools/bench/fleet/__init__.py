"""Nodes that boot one image at the same moment, each with its own mount, cache and 1 Gbit/s link (`make bench-fleet`).

| module | subject |
|---|---|
| `network` | a network namespace for the site, and one for each node behind a link of its own |
| `ways` | the ways by which bytes come: Glance's ranges, the nginx tier before it; a store is one class more |
| `nodes` | mounts of many nodes, and the replay of the recorded boot on all of them at once |
| `record` | what is kept of a run as JSON, and the table made of it |
| `model` | what the measured parts say of fleets that no machine here can hold (docs/SCALE.md) |
"""
