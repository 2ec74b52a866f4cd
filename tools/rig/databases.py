"""Empty, migrated databases of the services, made once: 2 to 7 s saved a rig; and rows that no API makes quickly."""

import contextlib
import hashlib
import os
import shutil
import sqlite3
import tempfile
import uuid

from tools.rig import templates
from tools.rig.identity import PASSWORD
from tools.rig.processes import ROOT, environment, run


def template(venv: str, name: str) -> str:
    """Return the directory with an empty, migrated database of `glance`, `cinder` or `keystone`, made if it is not."""
    version = next(entry for entry in sorted(os.listdir(_site_packages(venv))) if entry.startswith(name + "-"))
    # Keystone's holds the password: another one is another template.
    path = os.path.join(ROOT, ".cache", "rig", f"{version}-{hashlib.sha1(PASSWORD.encode()).hexdigest()[:8]}")
    if not os.path.isdir(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        scratch = tempfile.mkdtemp(dir=os.path.dirname(path), prefix=f".{name}-")
        os.makedirs(scratch + "/log")
        if name == "keystone":
            _make_keystone(venv, scratch)
        else:
            _make(venv, name, scratch)
        try:
            os.rename(scratch, path)
        except OSError:  # another process was faster
            shutil.rmtree(scratch)
    return path


def _make(venv: str, name: str, d: str) -> None:
    _write(f"{d}/{name}.conf", f"[database]\nconnection = sqlite:///{d}/{name}.sqlite\n")
    argv = [f"{venv}/bin/{name}-manage", "--config-file", f"{d}/{name}.conf", "db", "sync"]
    run(f"{name}-db", argv, env=environment(venv), log_directory=d + "/log")


def _make_keystone(venv: str, d: str) -> None:
    for name in ("keystone/fernet", "keystone/credential"):
        os.makedirs(f"{d}/{name}", mode=0o700)
    _write(d + "/keystone.conf", templates.KEYSTONE.format(d=d, expiration_s=3600))
    manage = [venv + "/bin/keystone-manage", "--config-file", d + "/keystone.conf"]
    who = ["--keystone-user", str(os.getuid()), "--keystone-group", str(os.getgid())]
    for step in (
        ["db_sync"],
        ["fernet_setup", *who],
        ["credential_setup", *who],
        ["bootstrap", "--bootstrap-password", PASSWORD, "--bootstrap-region-id", "RegionOne"],
    ):
        run("keystone-" + step[0], [*manage, *step], env=environment(venv), log_directory=d + "/log")


def copy_image_rows(glance_sqlite: str, image_id: str, count: int) -> list[str]:
    """Insert `count` copies of an image and its locations, named `<its name>-<n>`; returns their ids."""
    ids = [str(uuid.uuid4()) for _ in range(count)]
    with contextlib.closing(sqlite3.connect(glance_sqlite, timeout=60)) as db, db:
        _copy_rows(db, "images", "id", image_id, [{"id": new, "name": f"-{n}"} for n, new in enumerate(ids)])
        _copy_rows(db, "image_locations", "image_id", image_id, [{"id": None, "image_id": new} for new in ids])
    return ids


def set_image_size(glance_sqlite: str, image_id: str, size: int) -> None:
    """Make the image one of `size` bytes that has no hashes."""
    with contextlib.closing(sqlite3.connect(glance_sqlite, timeout=60)) as db, db:
        db.execute(
            "UPDATE images SET size = ?, virtual_size = ?, checksum = NULL, os_hash_algo = NULL,"
            " os_hash_value = NULL WHERE id = ?",
            (size, size, image_id),
        )


def _copy_rows(db: sqlite3.Connection, table: str, key: str, value: str, changes: list[dict[str, str | None]]) -> None:
    """Insert the rows with `key` = `value` once for each of `changes`; a changed name is added to the old one."""
    cursor = db.execute(f"SELECT * FROM {table} WHERE {key} = ?", (value,))
    columns = [column[0] for column in cursor.description]
    for row in cursor.fetchall():
        for change in changes:
            new = {**dict(zip(columns, row, strict=True)), **change}
            if "name" in change:
                new["name"] = f"{row[columns.index('name')]}{change['name']}"
            db.execute(
                f"INSERT INTO {table} ({', '.join(new)}) VALUES ({', '.join('?' * len(new))})", list(new.values())
            )


def _site_packages(venv: str) -> str:
    lib = os.path.join(venv, "lib")
    return os.path.join(lib, os.listdir(lib)[0], "site-packages")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as out:
        out.write(text)
