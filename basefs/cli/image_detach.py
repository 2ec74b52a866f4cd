"""`basefs image detach`: take an image from its volume."""

import argparse

from basefs.cli.common import BasefsCommand


class ImageDetach(BasefsCommand):
    """Detach the volume that an image is read from; it is linked again when it is opened next."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        """See cliff."""
        parser = super().get_parser(prog_name)
        parser.add_argument("ref", metavar="IMAGE", help="image id, name in _base, or unique image name")
        parser.add_argument(
            "--force", action="store_true", help="also while the image is in use; it is read through Glance then"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        """Returns when the volume is detached."""
        answer = self.client().detach(parsed_args.ref, force=parsed_args.force)
        volume_id, image_id = answer["volume_id"], answer["image_id"]
        if volume_id is None:
            done = f"image {image_id} had no volume yet, and is linked to none until it is opened next"
        else:
            done = f"detached volume {volume_id} of image {image_id}"
        self.app.stdout.write(f"{done}\n")
