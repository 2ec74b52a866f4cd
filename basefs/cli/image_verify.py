"""`basefs image verify`."""

import argparse
from contextlib import closing
from typing import Any

from basefs.cli.cells import human_bytes
from basefs.cli.common import FAILURE, INTERRUPTED, BasefsCommand, say_error
from basefs.cli.progress import progress_reporter
from basefs.errors import ControlError


class ImageVerify(BasefsCommand):
    """Read the local bytes of images from the disk and compare them with their checksums.

    Damaged chunks are dropped, and fetched again where the image is open or was complete. Not checked is whether an
    image as a whole has the hash that Glance tells, and what is not here.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """See cliff."""
        parser = super().get_parser(prog_name)
        which = parser.add_mutually_exclusive_group(required=True)
        which.add_argument("ref", metavar="IMAGE", nargs="?", help="image id, name in _base, or unique image name")
        which.add_argument("--all", dest="is_all", action="store_true", help="every image that has bytes here")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        """0 when nothing was damaged; 1 when something was, or could not be read; 130 after Ctrl-C."""
        results: dict[str, dict[str, Any]] = {}
        last: dict[str, Any] = {}
        is_ended = False
        try:
            with (
                closing(self.client().verify(parsed_args.ref)) as steps,
                progress_reporter(self.app.stdout, "checking", "checked_bytes", "cached_bytes", _describe) as reporter,
            ):
                for step in steps:
                    if step["state"] == "ended":
                        is_ended = True
                        break
                    last = step
                    if last["state"] == "checking":
                        reporter.show(last)
                    else:
                        results[last["image_id"]] = last
                        self._tell(last)
        except KeyboardInterrupt:
            say_error(f"stopped; {_describe(last)}" if last else "stopped")
            return INTERRUPTED
        if not is_ended:
            raise ControlError("the server stopped before every image was checked; see its log, and verify again")
        return self._outcome(list(results.values()))

    def _tell(self, result: dict[str, Any]) -> None:
        if result["state"] == "failed":
            say_error(f"{result['image_id']}: {result['error']}")
            return
        self.app.stdout.write(f"{_describe(result)}\n")
        if result["error"]:
            say_error(f"{result['image_id']}: fetched again when it is read: {result['error']}")

    def _outcome(self, results: list[dict[str, Any]]) -> int:
        damaged = sum(result["damaged_chunks"] for result in results)
        failed = sum(result["state"] == "failed" for result in results)
        checked = human_bytes(sum(result["checked_bytes"] for result in results))
        self.app.stdout.write(f"{len(results)} images, {checked} checked, {damaged} chunks were damaged\n")
        return FAILURE if damaged or failed else 0


def _describe(step: dict[str, Any]) -> str:
    text = f"{step['image_id']}: {human_bytes(step['checked_bytes'])} checked"
    if step["damaged_chunks"]:
        text += f", {step['damaged_chunks']} chunks were damaged, {step['refetched_chunks']} of them fetched again"
    return text
