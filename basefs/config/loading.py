"""From files to `Settings`: unknown keys, bad values and options that contradict each other all stop here.

A `ConfigError` names file, section and key, never a value of [glance] nor the text of a line: a typing error
in a password must not end up in a log.
"""

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from oslo_config import cfg
from oslo_log import log

from basefs import mounts
from basefs.config.auth_sections import auth_section_of
from basefs.config.checks import cache_endpoint_problem, check_together
from basefs.config.files import DEFAULT_CONFIG_FILE, Entry, find_config_files, read_entries
from basefs.config.options import BASEFS_OPTS, GLANCE_SECTION, glance_common_opts
from basefs.config.settings import Settings
from basefs.config.source_options import (
    FILE_OPTS,
    FILE_SECTION,
    HTTP_OPTS,
    HTTP_SECTION,
    file_location_settings,
    http_location_settings,
)
from basefs.config.store_options import (
    RBD_OPTS,
    RBD_SECTION,
    S3_OPTS,
    S3_SECTION,
    SWIFT_OPTS,
    SWIFT_SECTION,
    rbd_settings,
    s3_settings,
    swift_common_opts,
    swift_settings,
)
from basefs.config.trace_options import TRACE_OPTS, TRACE_SECTION
from basefs.config.volume_options import (
    CINDER_SECTION,
    LINKING_SECTION,
    VOLUME_LINKING_OPTS,
    cinder_common_opts,
    volume_linking_settings,
)
from basefs.errors import ConfigError

READERS_DEFAULT_MAX = 4
_PATH_OPTIONS = ("mountpoint", "cache_dir", "control_socket", "instances_path")
_OUR_SECTIONS = ("basefs", LINKING_SECTION, TRACE_SECTION, HTTP_SECTION, FILE_SECTION, RBD_SECTION)
_ENDPOINT_NEEDED = ("none", "admin_token", "http_basic")
"""Plugins without a service catalog: where Glance is must be said."""


def load_settings(config_files: Sequence[str] = (), config_dirs: Sequence[str] = ()) -> tuple[cfg.ConfigOpts, Settings]:
    """The options as oslo.config has them (for [glance], [cinder] and oslo.log) and the checked settings of the others.

    Which files are read: see `find_config_files`. Neither the mount point nor anything in it is touched while
    basefs is mounted, so that this never waits for a server, and a server may call it.

    Raises:
        ConfigError: A file, section, key or value is not usable; the message names all that were found.
    """
    paths = find_config_files(config_files, config_dirs)
    entries = read_entries(paths)
    conf = _parsed(paths)
    conf.register_opts(glance_common_opts(), group=GLANCE_SECTION)
    conf.register_opts(cinder_common_opts(), group=CINDER_SECTION)
    conf.register_opts(swift_common_opts(), group=SWIFT_SECTION)
    auth_section = _register_auth(conf, paths, entries)
    _register_further_auth(conf, entries, CINDER_SECTION)
    _register_further_auth(conf, entries, SWIFT_SECTION)
    known = _known_keys(conf)
    _refuse_unknown(entries, known)
    _check_values(conf, entries)
    _check_glance(conf, auth_section)
    settings = _settings(conf)
    check_together(settings)
    return conf, settings


def load_mount_settings(
    config_files: Sequence[str] = (), config_dirs: Sequence[str] = ()
) -> tuple[cfg.ConfigOpts, Settings]:
    """What `basefs mount --background` itself needs: all but [glance] and [cinder], which the server checks.

    The server calls `load_settings` before anything is mounted, and its error is the command's. So keystoneauth is
    imported once a start, not twice: 0.4 s of 2.

    Raises:
        ConfigError: As `load_settings`, but unknown keys, [glance] and [cinder] are not looked at.
    """
    paths = find_config_files(config_files, config_dirs)
    entries = read_entries(paths)
    conf = _parsed(paths)
    _check_values(conf, entries)
    settings = _settings(conf)
    check_together(settings)
    return conf, settings


def _parsed(paths: list[str]) -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    log.register_options(conf)
    conf.register_opts(BASEFS_OPTS, group="basefs")
    conf.register_opts(VOLUME_LINKING_OPTS, group=LINKING_SECTION)
    conf.register_opts(HTTP_OPTS, group=HTTP_SECTION)
    conf.register_opts(FILE_OPTS, group=FILE_SECTION)
    conf.register_opts(TRACE_OPTS, group=TRACE_SECTION)
    conf.register_opts(RBD_OPTS, group=RBD_SECTION)
    conf.register_opts(S3_OPTS, group=S3_SECTION)
    conf.register_opts(SWIFT_OPTS, group=SWIFT_SECTION)
    try:
        conf(args=[], project="basefs", prog="basefs", default_config_files=paths, default_config_dirs=[])
    except (cfg.Error, ValueError) as exc:
        # Only options of oslo.log have a command line form and are converted here; none of them is a secret.
        raise ConfigError(f"configuration: {exc}") from None
    return conf


def _register_auth(conf: cfg.ConfigOpts, paths: list[str], entries: list[Entry]) -> str:
    """Make the options of the chosen auth plugin known; the section they are read from."""
    from keystoneauth1 import loading

    try:
        section: str = conf[GLANCE_SECTION].auth_section or GLANCE_SECTION
        if section != GLANCE_SECTION:
            conf.register_opts(loading.get_auth_common_conf_options(), group=section)
        auth_type = conf[section].auth_type
    except cfg.Error:
        raise ConfigError("[glance] auth_type, auth_section: a $ must be written $$") from None
    if not auth_type:
        read = ", ".join(paths) or f"no configuration file ({DEFAULT_CONFIG_FILE} is missing; give --config-file)"
        raise ConfigError(
            f"[{section}] auth_type is not set: say how basefs authenticates to Glance, e.g. password, "
            f"v3applicationcredential or none; read: {read}"
        )
    _register_plugin(conf, entries, section, auth_type)
    return section


def _register_further_auth(conf: cfg.ConfigOpts, entries: list[Entry], user: str) -> None:
    """As `_register_auth`, for a section `user` that has an auth plugin of its own, else uses that of [glance]."""
    from keystoneauth1 import loading

    try:
        section = auth_section_of(conf, user)
        if section == (conf[GLANCE_SECTION].auth_section or GLANCE_SECTION):
            return
        if section != user:
            conf.register_opts(loading.get_auth_common_conf_options(), group=section)
        auth_type = conf[section].auth_type
    except cfg.Error:
        raise ConfigError(f"[{user}] auth_type, auth_section: a $ must be written $$") from None
    if not auth_type:
        raise ConfigError(f"[{section}] auth_type is not set, and [{user}] auth_section names that section")
    _register_plugin(conf, entries, section, auth_type)


def _register_plugin(conf: cfg.ConfigOpts, entries: list[Entry], section: str, auth_type: str) -> None:
    from keystoneauth1 import exceptions as ksa_exceptions
    from keystoneauth1 import loading

    try:
        plugin_opts = loading.get_auth_plugin_conf_options(auth_type)
    except ksa_exceptions.NoMatchingPlugin:
        close = difflib.get_close_matches(auth_type, loading.get_available_plugin_names(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{_place(entries, section, 'auth_type')}: there is no such auth plugin{hint}") from None
    conf.register_opts(plugin_opts, group=section)


def _known_keys(conf: cfg.ConfigOpts) -> dict[str, set[str]]:
    """Section (lower case, but DEFAULT) -> every spelling of its keys that oslo.config accepts."""
    known: dict[str, set[str]] = {}
    for section, opt in _registered(conf):
        known.setdefault(section, set()).update({opt.dest, opt.name})
        for old in opt.deprecated_opts:
            known.setdefault(_normalized(old.group or section), set()).add(old.name or opt.dest)
    for opt_name in ("config_file", "config_dir", "config_source", "config-file", "config-dir", "config-source"):
        known["DEFAULT"].discard(opt_name)
    return known


def _registered(conf: cfg.ConfigOpts) -> list[tuple[str, cfg.Opt]]:
    """(section, option) of everything that was registered."""
    # oslo.config has no public way to list registered options; these two have been stable for a decade.
    found = [("DEFAULT", info["opt"]) for info in conf._opts.values()]  # noqa: SLF001
    for group in conf._groups.values():  # noqa: SLF001
        found += [(_normalized(group.name), info["opt"]) for info in group._opts.values()]  # noqa: SLF001
    return found


def _normalized(section: str) -> str:
    return section if section == "DEFAULT" else section.lower()


def _refuse_unknown(entries: list[Entry], known: dict[str, set[str]]) -> None:
    problems = []
    for entry in entries:
        section = _normalized(entry.section)
        where = f"{entry.path}, line {entry.line}"
        if section not in known:
            if entry.key is None:
                problems.append(f"{where}: unknown section [{entry.section}]{_did_you_mean(section, known)}")
        elif entry.key is not None and entry.key not in known[section]:
            # A key that is no identifier may be the tail of a secret that broke over a line.
            shown = entry.key if entry.key.replace("-", "_").isidentifier() else "(not a name)"
            problems.append(
                f"{where}: unknown key {shown} in [{entry.section}]{_did_you_mean(entry.key, known[section])}"
            )
    if problems:
        raise ConfigError("; ".join(problems))


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _check_values(conf: cfg.ConfigOpts, entries: list[Entry]) -> None:
    problems = []
    for section, opt in _registered(conf):
        try:
            value = conf[opt.dest] if section == "DEFAULT" else conf[section][opt.dest]
            # `name =` makes a number None, and NaN is neither below a minimum nor above a maximum.
            if section in _OUR_SECTIONS and ((value is None and opt.default is not None) or value != value):
                problems.append(f"{_place(entries, section, opt.dest)}: is no value")
        except ValueError as exc:
            problems.append(f"{_place(entries, section, opt.dest)}: {_value_problem(section, opt, exc)}")
        except cfg.Error:
            # $name of no option; the name is not shown, it may be part of a password.
            problems.append(f"{_place(entries, section, opt.dest)}: a $ must be written $$")
    if problems:
        raise ConfigError("; ".join(problems))


def _value_problem(section: str, opt: cfg.Opt, exc: ValueError) -> str:
    if opt.secret or section not in {*_OUR_SECTIONS, "DEFAULT"}:
        return f"the value is no {opt.type}"
    return str(exc).partition(" is not valid: ")[2] or str(exc)


def _place(entries: list[Entry], section: str, key: str) -> str:
    """Where the value in force comes from: the last file that sets it."""
    names = {key, key.replace("_", "-")}
    setting = [e for e in entries if e.key in names and _normalized(e.section) == _normalized(section)]
    where = f"{setting[-1].path}, line {setting[-1].line}" if setting else "environment or default"
    return f"{where}: [{section}] {key}"


def _check_glance(conf: cfg.ConfigOpts, auth_section: str) -> None:
    """Everything about [glance] that can be known without asking Keystone or Glance."""
    from keystoneauth1 import exceptions as ksa_exceptions
    from keystoneauth1 import loading

    glance = conf[GLANCE_SECTION]
    auth_type = conf[auth_section].auth_type
    if glance.interface and glance.valid_interfaces:
        raise ConfigError("[glance] interface and valid_interfaces exclude each other: use valid_interfaces")
    if auth_type in _ENDPOINT_NEEDED and not (glance.endpoint_override or conf[auth_section].get("endpoint")):
        raise ConfigError(
            f"[glance] endpoint_override is not set; auth_type = {auth_type} has no catalog to look it up"
        )
    if problem := cache_endpoint_problem(glance.cache_endpoint):
        raise ConfigError(f"[glance] cache_endpoint: {problem}")
    try:
        loading.load_auth_from_conf_options(conf, GLANCE_SECTION)
        loading.load_adapter_from_conf_options(conf, GLANCE_SECTION, session=None, auth=None)
    except ksa_exceptions.ClientException as exc:
        raise ConfigError(f"[{auth_section}] auth_type = {auth_type}: {exc}") from None
    except TypeError as exc:
        raise ConfigError(f"[glance]: {exc}") from None


def _settings(conf: cfg.ConfigOpts) -> Settings:
    values: dict[str, Any] = {opt.dest: conf.basefs[opt.dest] for opt in BASEFS_OPTS}
    for name in _PATH_OPTIONS:
        text = values[name]
        if text is None:
            continue
        if not text.startswith("/"):
            raise ConfigError(f"[basefs] {name} must be an absolute path: {text}")
        if "\0" in text:
            raise ConfigError(f"[basefs] {name} holds a NUL character")
        try:
            values[name] = mounts.resolved(text)
        except OSError as exc:
            raise ConfigError(f"[basefs] {name} = {text}: {exc.strerror}") from None
    values["source_order"] = tuple(values["source_order"])
    values["instances_path"] = values["instances_path"] or Path(values["mountpoint"]).parent
    if values["readers"] is None:
        values["readers"] = min(max(1, len(os.sched_getaffinity(0)) - 1), READERS_DEFAULT_MAX)
    return Settings(
        **values,
        trace_share=conf[TRACE_SECTION].share,
        volume_linking=volume_linking_settings(conf, values["cache_dir"]),
        http_location=http_location_settings(conf),
        file_location=file_location_settings(conf),
        rbd=rbd_settings(conf),
        s3=s3_settings(conf),
        swift=swift_settings(conf),
    )
