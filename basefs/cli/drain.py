"""`basefs drain`: make everything in use a file of the lower directory, so that basefs can be unmounted for good."""

import argparse
from contextlib import closing
from typing import Any

from basefs.cli.cells import human_bytes
from basefs.cli.common import FAILURE, INTERRUPTED, BasefsCommand, say_error
from basefs.cli.progress import progress_reporter
from basefs.errors import ControlError

ENDS = ("graduated", "failed")


class Drain(BasefsCommand):
    """Bring, verify and graduate every image that is in use, and say whether it is safe to unmount then.

    An image is in use that is open, pinned, or the base of an overlay. Each becomes a plain file of the lower
    directory, as nova's own download would have left it. Files that are open stay open: guests go on, and are to be
    stopped, migrated or hard rebooted before `basefs unmount`.
    """

    def take_action(self, _parsed_args: argparse.Namespace) -> int:
        """0 when it is safe to unmount, 1 when an image could not be graduated, 130 after Ctrl-C."""
        ended: list[dict[str, Any]] = []
        last: dict[str, Any] = {}
        try:
            with (
                closing(self.client().drain()) as steps,
                progress_reporter(self.app.stdout, "completing", "cached_bytes", "size", _describe) as reporter,
            ):
                for last in steps:
                    if last["state"] == "ended":
                        break
                    if last["state"] in ENDS:
                        ended.append(last)
                        self._tell(last)
                    else:
                        reporter.show(last)
        except KeyboardInterrupt:
            say_error(f"stopped; {len(ended)} images were seen to, and what is here of the next one stays")
            return INTERRUPTED
        if last.get("state") != "ended":
            raise ControlError("the server stopped before every image was seen to; drain again")
        return self._outcome(ended)

    def _tell(self, step: dict[str, Any]) -> None:
        if step["state"] == "failed":
            say_error(f"{step['image_id']}: not graduated: {step['error']} (in use: {step['in_use']})")
        else:
            self.app.stdout.write(f"{step['image_id']}: is in the lower directory\n")

    def _outcome(self, ended: list[dict[str, Any]]) -> int:
        failed = sum(step["state"] == "failed" for step in ended)
        if failed:
            say_error(f"not safe to unmount: {failed} of {len(ended)} images in use are not in the lower directory")
            return FAILURE
        what = f"all {len(ended)} images in use are in the lower directory" if ended else "no image is in use"
        self.app.stdout.write(f"{what}: it is safe to unmount basefs once no file on it is open\n")
        return 0


def _describe(step: dict[str, Any]) -> str:
    return f"{step['image_id']}: {step['state']}, {human_bytes(step['cached_bytes'])} of {human_bytes(step['size'])}"
