"""The options of [trace]: boot traces beyond this node."""

from oslo_config import cfg

TRACE_SECTION = "trace"

TRACE_OPTS: list[cfg.Opt] = [
    cfg.StrOpt(
        "share",
        default="none",
        choices=[
            ("none", "each node knows the boots that it has seen, and what `basefs trace import` gave it"),
            ("glance", "as the property basefs_boot_trace of the image, by which other nodes' first boots are warm"),
        ],
        help="How nodes learn from each other what a boot of an image reads. With glance, the user of [glance] changes "
        "images: it takes the role admin, or member in the project that owns the image.",
    ),
]
