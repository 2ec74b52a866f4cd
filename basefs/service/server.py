"""The composition root: builds the objects, opens the service nursery, and takes all down again.

service nursery ............ lives as long as the mount
├─ state database writer
├─ catalog refresher
├─ flights: checks, transfers, warmings
├─ hydrator
├─ control socket
└─ FUSE session ............ its end is the service's end
"""

import gc
import importlib.metadata
import logging
import os
import pwd
import threading
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from basefs import errors
from basefs.cache.fetch_services import FetchCounters
from basefs.cache.state_db import StateDatabase
from basefs.catalog.glance_catalog import Catalog
from basefs.catalog.records import ImageEntry
from basefs.concurrency.gather import first_error
from basefs.config import Settings
from basefs.config.listen import listen_address
from basefs.control.listener import ControlListener
from basefs.core.inodes import image_inode
from basefs.fuse.directories import Directories
from basefs.fuse.image_files import ImageFiles, ImageFileSettings
from basefs.fuse.kernel_pages import KernelPages
from basefs.fuse.lower import LowerTree
from basefs.fuse.operations import Operations
from basefs.fuse.virtual_tree import HELD_PREFIX as VIRTUAL_PREFIX
from basefs.fuse.virtual_tree import VirtualTree
from basefs.handlers.base import Patience
from basefs.handlers.gate import ServableGate
from basefs.handlers.links import END_LIMIT_S as LINKS_END_LIMIT_S
from basefs.reader_attributes import AttributeCells
from basefs.service import last_config
from basefs.service.arguments import Arguments, option_texts, with_fixed
from basefs.service.cache_parts import STREAMS_MAX, build_cache
from basefs.service.drain import Drain
from basefs.service.graduation_parts import build_graduator
from basefs.service.hydration import build_hydrator
from basefs.service.inherited import open_database, open_graduated, open_lower_tree, open_open_table, open_reader_table
from basefs.service.integrity import Integrity
from basefs.service.keeper_channel import KeeperChannel
from basefs.service.last_config import Loaded
from basefs.service.linking import Linking, build_linking
from basefs.service.metrics import Metrics, MetricsParts, count_records, run_metrics
from basefs.service.process import outlive_keeper
from basefs.service.readers import Readers
from basefs.service.session import SYNCHRONOUS_MAX, serve_session
from basefs.service.sourcing import Sourcing
from basefs.service.view import View
from basefs.sources.access import GlanceAccess, open_glance
from basefs.sources.metadata import GlanceMetadata

log = logging.getLogger(__name__)

GUEST_USERS = ("libvirt-qemu", "qemu")
STOP_LIMIT_S = 5.0
"""How long the end of the service may take before what hangs is left behind, volumes that are detached aside; a keeper
waits as long."""


class Service:
    """One server's objects. `run` once."""

    def __init__(self, arguments: Arguments, loaded: Loaded, settings: Settings, channel: KeeperChannel) -> None:
        self._arguments = arguments
        self._loaded = loaded
        self._settings = settings
        self._channel = channel
        self._access: GlanceAccess = open_glance(loaded.conf, threads_max=settings.fetch_threads_max + STREAMS_MAX)
        self._chunks_dir = settings.cache_dir / "chunks"

    async def run(self) -> None:
        """Serve until the mount is gone.

        Raises:
            BasefsError: the service could not begin.
        """
        database = await open_database(self._settings.cache_dir, self._channel)
        lower = await open_lower_tree(self._arguments.lower_fd, self._channel)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(database.run)
                nursery.start_soon(self._channel.deliver)
                await self._serve(nursery, database, lower)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await database.close()
                await lower.close()
            self._access.close()

    async def _serve(self, nursery: trio.Nursery, database: StateDatabase, lower: LowerTree) -> None:
        settings = self._settings
        metadata = GlanceMetadata(self._access, with_boot_traces=settings.trace_share == "glance")
        catalog = Catalog(
            metadata,
            database,
            nursery,
            refresh_s=settings.catalog_refresh_s,
            full_refresh_s=settings.catalog_full_refresh_s,
            lookup_deadline_s=settings.lookup_deadline_s,
            outage=self._access.endpoints.outage,
        )
        await catalog.load()
        counters = FetchCounters()
        sourcing = Sourcing(self._loaded.conf, self._access, settings, catalog, nursery, lambda: cache.handler)
        source = sourcing.source
        is_first = self._channel.begun.get("reason", "first") == "first"
        pages = KernelPages(self._arguments.session_fd, nursery)
        reader_table = await open_reader_table(self._channel)
        graduated = await open_graduated(self._arguments.lower_fd, self._channel, nursery, catalog)
        linking: Linking | None = None

        def forget_pages(entry: ImageEntry) -> None:
            pages.forget(image_inode(entry.number))
            sourcing.distrust(entry)
            if linking is not None:
                linking.distrust(entry)

        cache = await build_cache(
            nursery,
            source,
            catalog,
            counters,
            settings,
            outage=self._access.endpoints.outage,
            forget_pages=forget_pages,
            blame=sourcing.blame,
            is_first=is_first,
            graduated=graduated,
            publish_trace=metadata.set_boot_trace,
            reader_table=reader_table,
        )
        handler = cache.handler
        inner = await sourcing.place(cache, self._channel, nursery)
        linking = build_linking(
            self._loaded, settings, catalog, cache, inner, self._access, self._channel, database, nursery
        )
        links = linking.links
        integrity = Integrity(catalog, handler, cache.uses, database, settings)
        gate = ServableGate(
            source,
            linking.handler,
            nursery,
            catalog.touch,
            view=settings.view,
            verify_signatures=settings.verify_glance_signatures,
            header_bytes=settings.chunk_bytes,
            require_verified=settings.require_verified,
            is_in_use=lambda entry: bool(cache.uses.why_in_use(entry)),
            find_volume=links.steps.find if links and settings.template_image_handler == "volume-linking" else None,
        )
        view = View(
            catalog,
            gate,
            handler,
            sourcing,
            self._access,
            mountpoint=settings.mountpoint,
            view=settings.view,
            keeper_pid=self._arguments.keeper_pid,
            check_deadline_s=settings.lookup_deadline_s,
            counters=counters,
            integrity=integrity,
            cache=cache,
            linking=linking,
        )
        opens = await open_open_table(self._channel)
        # Places of readers that an earlier server wanted may still have some, for a moment.
        is_shared = settings.readers > 0 or int(self._channel.begun.get("reader_places", 0)) > 0
        images = ImageFiles(
            catalog,
            gate,
            linking.handler,
            self._file_settings(),
            nursery,
            opens,
            stored=database.stored,
            cells=AttributeCells(reader_table.words) if is_shared else None,
        )
        images.told.take_over(catalog.by_number)
        database.touched = images.told.changed
        await sourcing.begin()
        await linking.begin()
        nursery.start_soon(images.remove_left_over)
        graduator = build_graduator(nursery, handler, graduated, images, settings, stored=linking.stored_by(database))
        nursery.start_soon(graduator.tidy_up, catalog.entries)
        outage = self._access.endpoints.outage
        hydrator = build_hydrator(
            cache,
            catalog,
            gate,
            settings,
            outage,
            graduation=graduator,
            is_linked=lambda entry: linking.is_linked(entry) or sourcing.is_placed(entry),
        )
        linking.wakes(hydrator.wake, cache)
        if sourcing.placed is not None:
            sourcing.placed.changed = hydrator.wake
        view.drains = Drain(catalog, cache.uses, graduator, nursery, complete=hydrator.complete)
        virtual = VirtualTree(catalog, images, view.status, view.report, self._channel)
        virtual.restore(self._channel.take(VIRTUAL_PREFIX))
        directories = Directories(lower, images, virtual, nova_uid=_uid_of(settings.nova_user))
        view.operations = Operations(lower, images, virtual, directories)
        readers = Readers(
            view.operations, images, lower, reader_table, requests_max=settings.max_background + SYNCHRONOUS_MAX
        )
        metrics = Metrics(
            MetricsParts(
                catalog=catalog,
                gate=gate,
                handler=handler,
                source=source,
                glance=sourcing.glance,
                placed=sourcing.placed,
                tier=sourcing.tier,
                access=self._access,
                operations=view.operations,
                counters=counters,
                records=count_records(),
                channel=self._channel,
                cache=cache,
                integrity=integrity,
                graduator=graduator,
                linking=linking,
                readers=readers,
                is_serving=lambda: view.state == "serving",
            )
        )
        listener = ControlListener(settings.control_socket)
        nursery.start_soon(self._access.endpoints.watch)
        nursery.start_soon(catalog.run)
        # What stands now stays: without it the collector walks all of it again and again.
        gc.collect()
        gc.freeze()
        gc.enable()
        try:
            async with trio.open_nursery() as session:
                await session.start(
                    partial(serve_session, readers=readers if is_shared else None),
                    view.operations,
                    self._arguments.session_fd,
                    self._channel,
                    settings.max_background,
                )
                view.state = "serving"
                log.info("serving %s with %d known images", settings.mountpoint, len(catalog))
                await last_config.keep(self._channel, self._loaded)
                nursery.start_soon(_serve_commands, view, listener)
                nursery.start_soon(integrity.run)
                nursery.start_soon(hydrator.run)
                nursery.start_soon(run_metrics, metrics, listen_address(settings.metrics_listen))
        finally:
            listener.close()
        view.state = "stopping"
        if links is not None and links.has_some and not self._channel.is_stopped:
            _end_by(LINKS_END_LIMIT_S + STOP_LIMIT_S)
            await links.close()
        else:
            _end_by(STOP_LIMIT_S)
        await graduator.stop()  # it has images open
        await linking.handler.close()
        await source.close()
        await self._channel.flush()

    def _file_settings(self) -> ImageFileSettings:
        settings = self._settings
        lower = os.fstat(self._arguments.lower_fd)
        return ImageFileSettings(
            lookup_deadline_s=settings.lookup_deadline_s,
            guest=Patience(deadline_s=settings.guest_io_deadline_s, is_guest=True),
            other=Patience(deadline_s=settings.other_io_deadline_s, is_guest=False),
            guest_uids=frozenset(uid for uid in map(_uid_of, GUEST_USERS) if uid is not None),
            owner_uid=lower.st_uid,
            owner_gid=lower.st_gid,
        )


async def _serve_commands(view: View, listener: ControlListener) -> None:
    """Ends when it is cancelled. Commands that came before wait in the socket's backlog."""
    serve_control = await trio.to_thread.run_sync(_import_control_server)
    gc.freeze()
    await serve_control(view, listener)


def _import_control_server() -> Callable[[View, ControlListener], Awaitable[None]]:
    # Late, and in a thread: hypercorn and starlette are a third of all imports, and no guest waits for them.
    from basefs.control.server import serve_control

    return serve_control


def _end_by(limit_s: float) -> None:
    """End the process after `limit_s`, whatever hangs: a thread inside a request cannot be stopped.

    What it may cost is the last second of counts in the state database; chunks are complete or not there at any moment.
    """
    timer = threading.Timer(limit_s, os._exit, [0])
    timer.daemon = True
    timer.start()


def _uid_of(user: str) -> int | None:
    """The uid of a user by name or number; None where the machine has no such user."""
    if user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return None


async def serve(arguments: Arguments, loaded: Loaded, channel: KeeperChannel) -> None:
    """Wait for our turn, then serve the mount that the keeper `arguments` come from, until it is gone.

    Returns also when the keeper says `stop`.

    Raises:
        BasefsError: the service could not begin; the keeper was told.
    """
    try:
        settings, not_applied = with_fixed(loaded.settings, arguments.fixed)
        service = Service(arguments, loaded, settings, channel)
        if arguments.is_standby:
            _import_control_server()
            gc.collect()
            gc.freeze()
        version = importlib.metadata.version("basefs")
        if await channel.begin(
            version=version, options=option_texts(settings), not_applied=not_applied, config_error=loaded.error
        ):
            outlive_keeper()
            await service.run()
    except* errors.BasefsError as group:
        error = first_error(group)
        channel.send({"type": "failed", "error": str(error)})
        raise error from None
