"""Boot traces in a real Glance behind a real Keystone: who may write them, and that they come with the list."""

from pathlib import Path

import pytest
import trio

from basefs import errors
from basefs.catalog.glance_images import record_of
from basefs.core.boot_trace import BootTrace, TracedImage, TraceRange
from basefs.core.trace_property import property_of, trace_of_property
from basefs.sources.metadata import GlanceMetadata
from tests.sources.access import access_to
from tools.rig import Rig

pytestmark = [pytest.mark.glance, pytest.mark.keystone]
DATA = b"0123456789abcdef" * 8192


def metadata_of(rig: Rig, tmp_path: Path, user: str, project: str = "service") -> GlanceMetadata:
    lines = rig.conf_lines().replace("username = basefs", f"username = {user}")
    lines = lines.replace("project_name = service", f"project_name = {project}")
    return GlanceMetadata(access_to(tmp_path, lines), with_boot_traces=True)


async def trace_in_glance(metadata: GlanceMetadata, image_id: str) -> BootTrace:
    """As another node gets it: with the list."""
    record = next(record_of(image) for image in await metadata.list_images() if image["id"] == image_id)
    assert record is not None
    assert record.boot_trace is not None
    return trace_of_property(record.boot_trace, traced(image_id, record.os_hash_value))


def traced(image_id: str, os_hash_value: str | None) -> TracedImage:
    return TracedImage(image_id=image_id, size=len(DATA), os_hash_algo="sha512", os_hash_value=os_hash_value)


async def test_an_admin_writes_traces_to_any_image_and_a_member_to_its_projects(
    keystone_rig: Rig, tmp_path: Path
) -> None:
    upload = trio.to_thread.run_sync
    public = await upload(lambda: keystone_rig.api("admin").upload(DATA, "public", visibility="public"))
    private = await upload(lambda: keystone_rig.api("u2").upload(DATA, "private", visibility="private"))
    own = await upload(lambda: keystone_rig.api("basefs-service").upload(DATA, "own", visibility="private"))
    admin = metadata_of(keystone_rig, tmp_path, "basefs")
    member = metadata_of(keystone_rig, tmp_path, "basefs-service")
    for image_id in (public, private, own):
        image = await admin.show_image(image_id)
        trace = BootTrace(
            image=traced(image_id, image["os_hash_value"]), boots=3, by_guest=True, ranges=(TraceRange(0, 2, 0),)
        )
        await admin.set_boot_trace(image_id, "of somebody else")
        await admin.set_boot_trace(image_id, property_of(trace))
        assert await trace_in_glance(admin, image_id) == trace
        if image_id == own:
            await member.set_boot_trace(image_id, property_of(trace))
            assert await trace_in_glance(member, own) == trace
        elif image_id == public:
            assert await trace_in_glance(member, public) == trace
            with pytest.raises(errors.SourceForbiddenError, match="403"):
                await member.set_boot_trace(image_id, property_of(trace))
        else:
            with pytest.raises(errors.ImageNotFoundError):
                await member.set_boot_trace(image_id, property_of(trace))
    with pytest.raises(errors.ImageNotFoundError):
        await admin.set_boot_trace("11111111-2222-3333-4444-555555555555", "x")


async def test_a_list_without_traces_leaves_them_out(keystone_rig: Rig, tmp_path: Path) -> None:
    image_id = await trio.to_thread.run_sync(lambda: keystone_rig.upload(DATA, "traced"))
    admin = metadata_of(keystone_rig, tmp_path, "basefs")
    await admin.set_boot_trace(image_id, "x" * 8192)
    assert (await admin.show_image(image_id))["basefs_boot_trace"] == "x" * 8192
    admin._with_boot_traces = False
    assert "basefs_boot_trace" not in await admin.show_image(image_id)
