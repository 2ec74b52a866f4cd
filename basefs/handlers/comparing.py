"""Whether what an image shall be read from, beside the cache, is the image, as its size and first bytes tell."""

from basefs import errors
from basefs.catalog.checks import View, content_verdict
from basefs.catalog.records import ImageEntry
from basefs.concurrency.threads import BlockingCalls
from basefs.handlers.downloading import DownloadingTemplateImageHandler
from basefs.handlers.linked import VolumeSource

CHECK_BYTES = 1 << 20
CHECK_LIMIT_S = 15.0


class Comparison:
    """With the bytes that `downloading` gives, which the checks had."""

    def __init__(self, downloading: DownloadingTemplateImageHandler, view: View) -> None:
        self._downloading = downloading
        self._view = view
        self._inspections = BlockingCalls("inspections of volumes", threads_max=2)

    async def check(self, entry: ImageEntry, source: VolumeSource, found_bytes: int, *, what: str) -> None:
        """Return if nothing speaks against it; `what` it is, for the messages.

        Raises:
            NoVolumeError: it is not the image.
            BasefsError: that cannot be found out now.
        """
        if found_bytes < entry.size:
            raise errors.NoVolumeError(f"{what} has {found_bytes} bytes, the image {entry.size}")
        length = min(entry.size, CHECK_BYTES)
        theirs = await source.volume_read(0, length, limit_s=CHECK_LIMIT_S)
        if theirs is None:
            raise errors.VolumeError(f"{what} did not give its first {length} bytes")
        fetcher = (await self._downloading.downloaded_image(entry)).fetcher
        ours = await fetcher.read(0, length, deadline_s=CHECK_LIMIT_S, patient=False)
        if theirs != ours:
            raise errors.NoVolumeError(f"{what} does not begin with the bytes that Glance gives")
        record, view = entry.record, self._view
        verdict = await self._inspections.run(lambda: content_verdict(record, theirs, view=view))
        if verdict.state == "refused":
            raise errors.NoVolumeError(f"{what}: {verdict.reason}")
