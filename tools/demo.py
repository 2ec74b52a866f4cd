"""`make demo`: a real Glance, a real Debian image, basefs over `_base`, and a guest that boots from bytes not yet here.

Ends by itself, in two minutes on an idle machine once the guest image is built; leaves nothing running or mounted.
"""

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tools.guest import Guest, boot, build, create_overlay
from tools.mount import BASEFS, ROOT, BasefsMount
from tools.rig import Rig

MB = 1_000_000
IMAGES = 3  # that Glance has


class Story:
    """Tells each step with the seconds since the beginning."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._steps = 0

    def step(self, text: str) -> None:
        """Begin a step."""
        self._steps += 1
        print(f"\n{self._steps}. {text}", flush=True)

    def say(self, text: str) -> None:
        """Tell something about the step."""
        print(f"   [{time.monotonic() - self._begun:3.0f} s] {text}", flush=True)

    def run(self, *argv: str | os.PathLike[str], cwd: Path | None = None) -> None:
        """Show a command and what it prints."""
        words = [os.fspath(word) for word in argv]
        shown = shlex.join(["basefs" if word == str(BASEFS) else word for word in words])
        print(f"   $ {shown}", flush=True)
        done = subprocess.run(words, check=True, cwd=cwd, text=True, capture_output=True)
        for line in done.stdout.splitlines():
            print("     " + line, flush=True)


def upload(story: Story, rig: Rig, guest: Guest, scratch: Path) -> str:
    """Fill Glance: the guest's disk, a small raw image, and a qcow2 image, which is shown as the disk in it."""
    story.step("Images go into Glance, by its API")
    small = rig.upload(os.urandom(1 << 20), "rescue-tools")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(scratch / "q"), "1G"], check=True)
    stored = rig.upload(scratch / "q", "windows-qcow2", "qcow2")
    story.say(f"rescue-tools   {small}  raw, 1 MiB")
    stored_bytes = (scratch / "q").stat().st_size
    story.say(f"windows-qcow2  {stored}  qcow2, {stored_bytes:,} bytes: shown as the raw disk of 1 GiB in it")
    image_id = rig.upload(guest.disk, "debian-12")
    size = guest.disk.stat().st_size
    story.say(f"debian-12      {image_id}  raw, {size / MB:,.0f} MB")
    return image_id


def look_at_mount(story: Story, mount: BasefsMount, image_id: str) -> None:
    """Show what nova would see."""
    story.step("Every image is a file in _base, named as nova names it; only its head is here, for the checks")
    mount.wait_for_images(IMAGES)
    story.run("ls", "-ls", "_base", cwd=mount.instances_path)
    base = Path("_base", mount.path(image_id).name)
    story.run("stat", "-c", "%s bytes long, %b blocks of %B bytes are here", base, cwd=mount.instances_path)
    story.run("readlink", f"_base/.basefs/by-id/{image_id}", cwd=mount.instances_path)


def boot_guest(story: Story, mount: BasefsMount, guest: Guest, image_id: str) -> float:
    """Do what nova and libvirt do: an overlay on the file, and a guest with cache=none on the overlay."""
    story.step("What nova does: a qcow2 overlay on it; and what libvirt does: a guest on the overlay, cache=none")
    disk = mount.instances_path / "disk"
    base = mount.path(image_id)
    story.say(f"$ qemu-img create -f qcow2 -o backing_file=_base/{base.name},backing_fmt=raw disk")
    create_overlay(base, disk)
    story.say("$ qemu-system-x86_64 -accel tcg -m 1024 -drive file=disk,format=qcow2,if=virtio,cache=none ...")
    result = boot(disk, guest, env=mount.environment)
    story.say(
        f"Debian reached multi-user.target after {result.ready_s:.1f} s and powered off after {result.total_s:.1f} s"
    )
    return result.ready_s


def show_status(story: Story, mount: BasefsMount, image_id: str, image_bytes: int) -> None:
    """Show how little was needed."""
    story.step("What that took")
    story.run(BASEFS, "image", "show", image_id, "--config-file", "basefs.conf", cwd=mount.directory)
    fetched = mount.image(image_id)["fetched_bytes"]
    share = 100 * fetched / image_bytes
    story.say(
        f"fetched {fetched / MB:,.0f} MB of {image_bytes / MB:,.0f} MB: {share:.1f} % of the image was enough to boot"
    )


def main() -> None:
    story = Story()
    print("basefs: every Glance image is a file in nova's _base at once; its bytes come when they are read.")
    story.step("A real Debian 12 guest, made by debootstrap and kept under .cache")
    guest = build()
    story.say(str(guest.disk.relative_to(ROOT)))
    cache = (ROOT / ".cache").resolve()  # as the mount table has it
    cache.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="demo-", dir=cache))
    try:
        story.step("A real Glance, on loopback")
        with Rig(scratch / "rig") as rig:
            story.say(f"{rig.glance_url} is up")
            image_id = upload(story, rig, guest, scratch)
            story.step("basefs is mounted over nova's image cache directory")
            with BasefsMount(scratch, rig.conf_lines()) as mount:
                story.say("$ basefs mount --background --config-file basefs.conf")
                look_at_mount(story, mount, image_id)
                boot_guest(story, mount, guest, image_id)
                show_status(story, mount, image_id, guest.disk.stat().st_size)
                story.step("basefs is unmounted; nothing is left running")
            story.say("done")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
