"""Inode numbers and handles: the same in every server, so they survive a restart (design section 2).

    1                  the mount's root
    2, 3, 4, 5         .basefs, .basefs/by-id, .basefs/images, .basefs/status.json
    2**32 + n          image number n
    2 * 2**32 + n      the link .basefs/by-id/<id>
    3 * 2**32 + n      .basefs/images/<id>.json
    2**63 | inode      a file of the lower directory

A handle on an image is `inode << 1 | is_guest`. Handles on lower files count up from `first_other_handle`.
"""

ROOT = 1
BASEFS_DIR = 2
BY_ID_DIR = 3
IMAGES_DIR = 4
STATUS_FILE = 5

_IMAGE = 1 << 32
_LINK = 2 << 32
_JSON = 3 << 32
_END = 4 << 32
LOWER = 1 << 63
_FIRST_OTHER_HANDLE = 1 << 40
_HANDLES_PER_MS_BITS = 7


def image_inode(number: int) -> int:
    """The inode of an image, 0 < number < 2**32."""
    return _IMAGE + number


def link_inode(number: int) -> int:
    """The inode of an image's link in `.basefs/by-id`."""
    return _LINK + number


def json_inode(number: int) -> int:
    """The inode of an image's report in `.basefs/images`."""
    return _JSON + number


def image_number_of(inode: int) -> int | None:
    """The image that `inode` is, or None."""
    return inode - _IMAGE if _IMAGE < inode < _LINK else None


def link_number_of(inode: int) -> int | None:
    """The image whose link `inode` is, or None."""
    return inode - _LINK if _LINK < inode < _JSON else None


def json_number_of(inode: int) -> int | None:
    """The image whose report `inode` is, or None."""
    return inode - _JSON if _JSON < inode < _END else None


def is_lower(inode: int) -> bool:
    """Whether `inode` is a file of the lower directory."""
    return bool(inode & LOWER)


def image_handle(number: int, *, is_guest: bool) -> int:
    """The handle on an image: what it is and who reads it."""
    return image_inode(number) << 1 | is_guest


def image_of_handle(handle: int) -> tuple[int, bool] | None:
    """The image number and `is_guest` of a handle, or None if it is on something else."""
    number = image_number_of(handle >> 1)
    return None if number is None else (number, bool(handle & 1))


def first_other_handle(since_boot_ns: int) -> int:
    """Where a server that starts now begins to number handles on lower files.

    Above every handle of the servers before it in this boot, whatever became of them, for none gives out 128 in each
    millisecond of its life; and below all other handles for 139 years.
    """
    return _FIRST_OTHER_HANDLE + (since_boot_ns // 1_000_000 << _HANDLES_PER_MS_BITS)
