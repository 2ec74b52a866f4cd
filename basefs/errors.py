"""The errors of basefs, in our words. No errno here: `fuse/errno_edge.py` has the one table.

Inner layers raise these and do not log; the edge that answers (FUSE, control socket, command line)
writes the one record. Callers tell cases apart by type, never by text. No message holds a token, a
password or a `connection_info`.
"""


class BasefsError(Exception):
    """Whatever basefs foresaw. The message names the option, file, image or byte concerned."""


# --- what the operator gave us ---------------------------------------------------------------------


class ConfigError(BasefsError):
    """An option, a configuration file or a path in them is not usable. Nothing was started."""


class MountError(BasefsError):
    """The mount, the lower directory or the cache directory cannot be had as asked."""


class ControlError(BasefsError):
    """The server cannot be reached over the control socket, or refused the command."""


class AmbiguousImageError(ControlError):
    """A name fits several images; the message lists their ids."""


class ImageBusyError(ControlError):
    """The image is open, so its local bytes are not dropped."""


class BadTraceError(ControlError):
    """A boot trace that was to be imported is none, or is of other bytes; the message names the byte or the member."""


# --- images ----------------------------------------------------------------------------------------


class ImageNotFoundError(BasefsError):
    """Glance said with authority that there is no such image (404, or status deleted)."""


class ImageRefusedError(BasefsError):
    """The image is there but must not be shown (design section 4); the message is the reason."""


class ImageDamagedError(BasefsError):
    """The image's own tables contradict themselves or its size; the message names the image and the byte."""


class ImageQuarantinedError(BasefsError):
    """The image's bytes do not have the hash that Glance tells; none of them is served."""


# --- sources ---------------------------------------------------------------------------------------


class SourceError(BasefsError):
    """The bytes or the metadata could not be had from Glance."""


class SourceUnavailableError(SourceError):
    """Try again later: no connection, time-out, 409, 429, 5xx, a body cut short.

    `retry_after_s` is what the server asked for (Retry-After), or None. `may_be_away`: so it would look if the whole
    endpoint were away (no connection, time-out, 5xx, a body cut short). `is_outage`: it was not even asked, for an
    outage is on that was told already.
    """

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        may_be_away: bool = False,
        is_outage: bool = False,
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.may_be_away = may_be_away
        self.is_outage = is_outage


class SourceForbiddenError(SourceError):
    """Glance refuses us: 401 after a fresh token, or 403 (no role, or image deactivated)."""


class SourceCorruptError(SourceError):
    """The answer contradicts itself or what was asked: wrong length, wrong position, wrong hash, no data.

    Nothing of it may be served.
    """


class SourceHashError(SourceCorruptError):
    """All bytes of an image came, and they do not have the hash that Glance tells."""


class RangeNotHonouredError(SourceError):
    """Glance's store does not answer ranges for this image (400, 200, a body longer than asked under a 206)."""


class StoreGoneError(SourceError):
    """A store behind Glance has no such object any more, or another one. Of the image itself that says nothing."""

    may_be_reopened = False
    """Only what was open is gone, with its connection: the object may be opened anew at once."""


# --- volumes ---------------------------------------------------------------------------------------


class VolumeError(BasefsError):
    """Cinder or the host did not do what attaching or detaching a volume needs. Reads go through Glance."""


class NoVolumeError(VolumeError):
    """There is no volume that may be linked for the image; the message is the reason."""


class VolumeRefusedError(VolumeError):
    """Cinder answered (4xx), and did not do what was asked for; after any other error it may have been done."""


class VolumeGoneError(VolumeRefusedError):
    """Cinder itself said that there is no such volume or attachment (404), or does not show it to us."""


class VolumeBusyError(VolumeRefusedError):
    """The volume's or attachment's state does not allow it now (400, 409): somebody else attaches it, say."""


# --- the cache -------------------------------------------------------------------------------------


class CacheError(BasefsError):
    """The cache disk did not take or give a byte. Never felt by a reader: the bytes go round the cache."""


# --- file operations -------------------------------------------------------------------------------


class NoSuchEntryError(BasefsError):
    """There is no such name or inode."""


class ReadOnlyError(BasefsError):
    """A virtual file or directory cannot be changed that way."""


class NotSupportedError(BasefsError):
    """The operation is not offered on this file."""


class NoSuchAttributeError(BasefsError):
    """The extended attribute is not there."""


class AttributeRangeError(BasefsError):
    """The caller's buffer is too small."""


class BadHandleError(BasefsError):
    """The file handle is unknown."""


class LowerFileError(BasefsError):
    """An operation on the lower directory failed; `os_error` is what its file system said."""

    def __init__(self, os_error: OSError) -> None:
        super().__init__(str(os_error))
        self.os_error = os_error


class DeadlineExceededError(BasefsError):
    """The bytes or the answer did not come within the configured deadline."""


class InternalError(BasefsError):
    """A bug of ours, caught at an edge."""
