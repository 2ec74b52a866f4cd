"""link_server.py DIRECTORY ADDRESS IMAGE: a rig with that one image; ends when standard input does.

Started inside a network namespace by link.py: the upload stays within it, so the slow link is not in its way.
"""

import json
import sys

from tools.rig import Rig


def main() -> None:
    directory, address, image = sys.argv[1:]
    with Rig(directory, host=address) as rig:
        image_id = rig.place(image, "debian12-with-ballast", visibility="public")
        told = {
            "image_id": image_id,
            "glance_url": rig.glance_url,
            "token": rig.token("u1"),
            "conf_lines": rig.conf_lines(),
        }
        print(json.dumps(told), flush=True)
        sys.stdin.read()


main()
