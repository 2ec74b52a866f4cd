"""`basefs doctor`: one line a check, with what to do; works whether or not basefs runs."""

import argparse
from collections.abc import Iterator

from cliff.lister import Lister

from basefs.cli.common import FAILURE, BasefsCommand
from basefs.cli.findings import Finding, error
from basefs.errors import ConfigError


class Doctor(BasefsCommand, Lister):
    """Check everything that basefs needs, from outside; exit code 1 when something is an error."""

    _has_errors = False

    def take_action(self, _parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Names and rows for cliff."""
        findings = list(self._findings())
        self._has_errors = any(finding.status == "error" for finding in findings)
        return ("check", "status", "detail"), [(f.check, f.status, f.detail) for f in findings]

    def run(self, parsed_args: argparse.Namespace) -> int:
        """See cliff; 1 when a check found an error."""
        code = super().run(parsed_args)
        return FAILURE if self._has_errors else code

    def _findings(self) -> Iterator[Finding]:
        from basefs.cli import check_host, check_mount
        from basefs.config import find_config_files

        yield from check_host.check_host()
        try:
            conf, settings = self.app.load()
        except ConfigError as exc:
            yield error("configuration", str(exc))
            return
        options = self.app.options
        yield check_host.check_config_files(find_config_files(options.config_file, options.config_dir))
        yield from check_host.check_directories(settings)
        yield from check_mount.check_mount(settings)

        from basefs.cli import check_glance, check_sources, check_volumes

        yield from check_glance.check_glance(conf)
        yield from check_sources.check_sources(conf, settings)
        yield from check_volumes.check_volumes(conf, settings)
