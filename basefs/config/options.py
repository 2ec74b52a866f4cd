"""Every option basefs has: section, name, type, bounds, default, and why the default is what it is."""

from typing import Any

from oslo_config import cfg

from basefs.config.source_options import FILE_OPTS, FILE_SECTION, HTTP_OPTS, HTTP_SECTION, SOURCE_ORDER_OPT

KIB = 1024
MIB = 1024 * KIB

GLANCE_SECTION = "glance"
SAMPLE_AUTH_TYPES = ("password", "v3applicationcredential", "none")
"""The plugins whose options the sample shows; every other keystoneauth plugin works too."""

_PATHS = [
    cfg.StrOpt(
        "mountpoint",
        default="/var/lib/nova/instances/_base",
        help="Where basefs is mounted: nova's image cache directory, <instances_path>/<subdirectory_name> of "
        "nova.conf. What is in the directory before the mount shows through, read and write, and wins.",
    ),
    cfg.StrOpt(
        "cache_dir",
        default="/var/lib/basefs",
        help="Chunks of images and the state database. Needs a local file system with sparse files. One basefs a "
        "directory. Not on, above or below the mount point.",
    ),
    cfg.StrOpt(
        "control_socket",
        default="/run/basefs/control.sock",
        help="Unix socket by which the commands talk to the server. Only its owner may use it (mode 0600).",
    ),
    cfg.StrOpt(
        "instances_path",
        help="nova's instances_path. Default: the parent of the mount point, which is right unless nova's "
        "subdirectory_name has several components.",
    ),
    cfg.StrOpt(
        "nova_user",
        default="nova",
        help="User that nova-compute runs as. Its directory listings show only images with local state, so that "
        "nova's cache manager does not take the others for garbage.",
    ),
]

_SHOWN = [
    cfg.StrOpt(
        "template_image_handler",
        default="auto",
        choices=[
            ("auto", "from the Cinder volume behind the image where there is one, else as downloading"),
            ("downloading", "chunks over the Glance API into the local cache, when they are read"),
            ("volume-linking", "as auto, but images without a volume are not shown: nova downloads those"),
        ],
        help="How base images are prepared.",
    ),
    SOURCE_ORDER_OPT,
    cfg.StrOpt(
        "view",
        default="raw",
        choices=[
            ("raw", "every base is shown as raw, as nova's default force_raw_images = True makes them"),
            ("stored", "qcow2 images are shown as they are stored; only where every nova has force_raw_images = False"),
        ],
        help="What a qcow2 image is shown as. Overlays remember the format of their base for ever: never change "
        "this while an overlay refers to a qcow2 image.",
    ),
    cfg.BoolOpt(
        "verify_glance_signatures",
        default=False,
        help="Set it where nova has [glance] verify_glance_signatures: signed images are then not shown, so that "
        "nova downloads and verifies them itself.",
    ),
]

_CACHE = [
    cfg.IntOpt(
        "cache_max_bytes",
        default=0,
        min=0,
        help="The cache may hold so many bytes, in allocated blocks; 0: no limit but cache_min_free_bytes. Else at "
        "least 8 times fetch_request_bytes_max. Least recently used chunks go first, those of images in use last.",
    ),
    cfg.IntOpt(
        "cache_min_free_bytes",
        default=1024 * MIB,
        min=0,
        help="The cache leaves so many bytes free on its disk, whoever uses the rest; 0: none. 1 GiB keeps a disk "
        "that others write to, too, from filling up between two looks at it.",
    ),
]

_FETCHING = [
    cfg.IntOpt(
        "chunk_bytes",
        default=64 * KIB,
        min=16 * KIB,
        max=4 * MIB,
        help="Granularity of the cache, in bytes; a power of two. A Debian boot touched 43 MB at 64 KiB, 65 MB at "
        "256 KiB, 128 MB at 1 MiB.",
    ),
    cfg.IntOpt(
        "fetch_threads_max",
        default=8,
        min=3,
        max=64,
        help="Requests to Glance in flight at a time. Two of them are kept for reads that somebody waits for.",
    ),
    cfg.IntOpt(
        "fetch_request_bytes_max",
        default=8 * MIB,
        min=256 * KIB,
        max=64 * MIB,
        help="Largest range asked for at once, in bytes; a multiple of chunk_bytes. One Glance process answers about "
        "170 requests a second whatever their size, so large ranges carry the throughput.",
    ),
    cfg.IntOpt(
        "read_ahead_bytes",
        default=MIB,
        min=0,
        max=16 * MIB,
        help="The kernel's readahead on the mount, in bytes; a multiple of 4096. 1 MiB instead of the kernel's "
        "128 KiB tripled buffered sequential reads of cached images.",
    ),
    cfg.IntOpt(
        "max_background",
        default=8192,
        min=1,
        max=65535,
        help="Asynchronous requests (O_DIRECT and readahead) that the kernel has open with the server at a time; "
        "further ones wait in the kernel, those for cached bytes too. So as many reads may wait for Glance before "
        "others wait for them; each costs about 8 KiB of memory.",
    ),
    cfg.IntOpt(
        "readers",
        min=0,
        max=16,
        help="Processes beside the server that answer reads of cached images by themselves; they go on while the "
        "server is replaced. 0: none. Default: one less than there are processors, at least 1, at most 4.",
    ),
]

_TIMES = [
    cfg.FloatOpt(
        "catalog_refresh_s",
        default=60.0,
        min=0.1,
        max=86400.0,
        help="Seconds between incremental refreshes of the image catalog. An unknown name asks Glance at once.",
    ),
    cfg.FloatOpt(
        "catalog_full_refresh_s",
        default=3600.0,
        min=0.1,
        max=604800.0,
        help="Seconds between full refreshes, which also notice deleted images. Not less than catalog_refresh_s.",
    ),
    cfg.FloatOpt(
        "lookup_deadline_s",
        default=5.0,
        min=0.1,
        max=60.0,
        help="Seconds a lookup of an unknown name may wait for Glance before EIO.",
    ),
    cfg.FloatOpt(
        "guest_io_deadline_s",
        default=300.0,
        min=1.0,
        max=86400.0,
        help="Seconds a guest's read (opened by a qemu system emulator) waits through an outage before EIO.",
    ),
    cfg.FloatOpt(
        "other_io_deadline_s",
        default=15.0,
        min=0.1,
        max=86400.0,
        help="Seconds anybody else's read waits before EIO. Not more than guest_io_deadline_s.",
    ),
]

_INTEGRITY = [
    cfg.IntOpt(
        "scrub_bytes_s",
        default=8 * MIB,
        min=0,
        max=16 * 1024 * MIB,
        help="Bytes a second at which the cache is read and checked in the background, while no read waits for the "
        "disk; 0: never. Damaged chunks are dropped, and fetched again where the image is open or was complete.",
    ),
    cfg.FloatOpt(
        "scrub_interval_s",
        default=86400.0,
        min=1.0,
        max=31536000.0,
        help="Seconds from the begin of one round of that check over the whole cache to the next, if it has ended.",
    ),
]

_COMPLETING = [
    cfg.IntOpt(
        "hydrate_concurrency_max",
        default=2,
        min=0,
        max=32,
        help="Requests in flight by which images in use are completed in the background; 0: only those are that nova's "
        "pre-cache call asked for, and those that turned out wrong. Nothing is begun while a read waits.",
    ),
    cfg.IntOpt(
        "hydrate_max_bytes_s",
        default=64 * MIB,
        min=0,
        max=16 * 1024 * MIB,
        help="Bytes a second at which images in use are completed, all together; 0: no limit. 64 MiB/s leaves half of "
        "a 1 Gbit/s link to the reads that guests wait for.",
    ),
    cfg.FloatOpt(
        "hydrate_delay_s",
        default=60.0,
        min=0.0,
        max=86400.0,
        help="Seconds after an image's first use before its completion begins: a boot comes first, and most images "
        "that are opened once by a tool are closed again by then.",
    ),
    cfg.BoolOpt(
        "require_verified",
        default=False,
        help="Show an image only once all of it is here and has the hash that Glance tells (`basefs image warm` brings "
        "it). Until then nova downloads it itself.",
    ),
    cfg.BoolOpt(
        "graduate",
        default=True,
        help="Make an image in use a plain raw file of the lower directory once all of it is here and verified: what "
        "nova's own download would have left. Its cache space is freed, and nova ages the file as its own.",
    ),
]

_OPERATIONS = [
    cfg.StrOpt(
        "metrics_listen",
        default="127.0.0.1:9757",
        help="ADDRESS:PORT that answers GET /metrics for Prometheus; empty: nowhere. Anybody who can connect can read "
        "image ids and figures, no bytes and no secret; where it is no loopback address a firewall has to say who.",
    ),
]

_REPLACING = [
    cfg.FloatOpt(
        "watchdog_s",
        default=20.0,
        min=2.0,
        max=3600.0,
        help="Seconds without an answer to the keeper's pings after which a server hangs: it is killed, and the next "
        "one takes over what waits.",
    ),
    cfg.FloatOpt(
        "upgrade_deadline_s",
        default=30.0,
        min=1.0,
        max=600.0,
        help="Seconds that a new server has at an upgrade to import and to read its configuration; the old one serves "
        "meanwhile, and serves on if they do not suffice.",
    ),
]

_CACHE_TIER = cfg.StrOpt(
    "cache_endpoint",
    help="URL of an HTTP cache in front of Glance, http or https; ranges of images are asked of it as of Glance, with "
    "the token, and of Glance itself where it fails. docs/OPERATIONS.md has an nginx for it. Default: none.",
)

BASEFS_OPTS: list[cfg.Opt] = [
    *_PATHS, *_SHOWN, *_CACHE, *_FETCHING, *_TIMES, *_INTEGRITY, *_COMPLETING, *_OPERATIONS, *_REPLACING,
]  # fmt: skip


def glance_common_opts() -> list[cfg.Opt]:
    """The options of [glance] that do not depend on `auth_type`: session, adapter, choice of the plugin, cache tier."""
    # Here and not at the top: keystoneauth1 takes 0.5 s to import, and help texts do not need it.
    from keystoneauth1 import loading

    adapter = loading.get_adapter_conf_options()
    cfg.set_defaults(adapter, service_type="image")
    return [*loading.get_auth_common_conf_options(), *loading.get_session_conf_options(), *adapter, _CACHE_TIER]


def list_opts() -> list[tuple[str, list[Any]]]:
    """What `oslo-config-generator --namespace basefs` writes. [DEFAULT] comes from the namespace `oslo.log`."""
    from keystoneauth1 import loading

    from basefs.config import store_options, trace_options, volume_options

    glance = {opt.dest: opt for opt in glance_common_opts()}
    for auth_type in SAMPLE_AUTH_TYPES:
        for opt in loading.get_auth_plugin_conf_options(auth_type):
            glance.setdefault(opt.dest, opt)
    return [
        ("basefs", BASEFS_OPTS),
        (trace_options.TRACE_SECTION, trace_options.TRACE_OPTS),
        (GLANCE_SECTION, list(glance.values())),
        (volume_options.LINKING_SECTION, volume_options.VOLUME_LINKING_OPTS),
        (volume_options.CINDER_SECTION, volume_options.cinder_common_opts()),
        (HTTP_SECTION, HTTP_OPTS),
        (FILE_SECTION, FILE_OPTS),
        (store_options.RBD_SECTION, store_options.RBD_OPTS),
        (store_options.S3_SECTION, store_options.S3_OPTS),
        (store_options.SWIFT_SECTION, [*store_options.SWIFT_OPTS, *store_options.swift_common_opts()]),
    ]
