"""The command `basefs`: global options, the list of commands, exit codes.

0 is success, 1 a failure said in one line on stderr, 2 a wrong command line, 130 Ctrl-C. Modules that take long
to import (keystoneauth, rich) are imported by the commands that need them.
"""

import argparse
import importlib.metadata
import logging
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cliff.app import App
from cliff.command import Command
from cliff.commandmanager import CommandManager

if TYPE_CHECKING:
    from oslo_config.cfg import ConfigOpts

    from basefs.config import Settings

DESCRIPTION = "Every Glance image is a file in nova's _base at once; its bytes come when they are read."
COMMANDS = {
    "mount": "mount:Mount",
    "unmount": "unmount:Unmount",
    "status": "status:Status",
    "upgrade": "upgrade:Upgrade",
    "drain": "drain:Drain",
    "doctor": "doctor:Doctor",
    "image list": "image:ImageList",
    "image show": "image:ImageShow",
    "image warm": "image:ImageWarm",
    "image evict": "image:ImageEvict",
    "image detach": "image_detach:ImageDetach",
    "image map": "image_map:ImageMap",
    "image verify": "image_verify:ImageVerify",
    "image pin": "image:ImagePin",
    "image unpin": "image:ImageUnpin",
}
USAGE_ERROR = 2


class _LazyCommand:
    """What cliff keeps of a command until it is called for."""

    def __init__(self, name: str, target: str) -> None:
        self.name = name
        module, _, self.attr = target.partition(":")
        self.module_name = f"basefs.cli.{module}"
        self.value = f"{self.module_name}:{self.attr}"

    def load(self, require: bool = False) -> type[Command]:  # noqa: ARG002  # cliff's own signature
        command: type[Command] = getattr(import_module(self.module_name), self.attr)
        return command


class BasefsApp(App):
    """cliff's App with our options, which may stand before or after the command."""

    NAME = "basefs"
    LOG = logging.getLogger("basefs.cli")

    def __init__(self) -> None:
        manager = CommandManager()
        for name, target in COMMANDS.items():
            manager.commands[name] = _LazyCommand(name, target)  # type: ignore[assignment]  # as cliff's entry points
        super().__init__(DESCRIPTION, importlib.metadata.version("basefs"), manager, deferred_help=True)
        self._loaded: tuple[ConfigOpts, Settings] | None = None

    def build_option_parser(
        self, description: str | None, version: str | None, argparse_kwargs: dict[str, Any] | None = None
    ) -> argparse.ArgumentParser:
        """The global options, and nothing of cliff's own that we do not have."""
        parser = argparse.ArgumentParser(
            prog=self.NAME, description=description, add_help=False, allow_abbrev=False, **(argparse_kwargs or {})
        )
        parser.add_argument("--version", action="version", version=f"{self.NAME} {version}")
        parser.add_argument("-h", "--help", dest="deferred_help", action="store_true", help="show this help")
        parser.add_argument("--debug", action="store_true", help="tell more on stderr, with tracebacks")
        parser.add_argument(
            "--config-file",
            metavar="FILE",
            action="append",
            default=[],
            help="configuration file; may be repeated, later ones win (default: /etc/basefs/basefs.conf)",
        )
        parser.add_argument(
            "--config-dir",
            metavar="DIR",
            action="append",
            default=[],
            help="directory of *.conf files, read after the files (default: /etc/basefs/basefs.conf.d)",
        )
        return parser

    def configure_logging(self) -> None:
        """Warnings of libraries to stderr; what cliff itself logs is a bug of ours that no command foresaw."""
        handler = logging.StreamHandler(self.stderr)
        handler.setLevel(logging.DEBUG if self.options.debug else logging.ERROR)
        handler.setFormatter(logging.Formatter("basefs: %(levelname)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        root.setLevel(logging.DEBUG if self.options.debug else logging.WARNING)
        if self.options.debug:
            from basefs.observability import mask_secrets

            mask_secrets(root)

    def interact(self) -> None:
        """There is no shell of our own: `basefs` alone shows what there is."""
        self.options.deferred_help = True
        self.print_help_if_requested()

    def load(self) -> "tuple[ConfigOpts, Settings]":
        """The configuration that the global options name, read once.

        Raises:
            ConfigError: See `load_settings`.
        """
        if self._loaded is None:
            from basefs.config import load_settings

            self._loaded = load_settings(self.options.config_file, self.options.config_dir)
        return self._loaded

    @property
    def settings(self) -> "Settings":
        """The checked settings of [basefs]."""
        return self.load()[1]


def main() -> None:
    """Entry point of the console script."""
    argv = sys.argv[1:]
    if not argv:
        argv = ["--help"]
    code = BasefsApp().run(argv)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # `basefs image list | head`: nobody reads on, and the interpreter must not complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
