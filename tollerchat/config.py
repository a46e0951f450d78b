"""Every setting, with its default, unit and environment variable."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import jwt
import psycopg2.extensions

from tollerchat.errors import ConfigError

__all__ = ("Config",)

# What browsers send of a page (RFC 6454, section 6.2).
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\s]+")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def _setting(
    default: Any, meaning: str, *, low: float | None = None, high: float | None = None, secret: bool = False
) -> Any:
    metadata = {"meaning": meaning, "low": low, "high": high}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


def _seconds(default: float, meaning: str, *, low: float) -> Any:
    return _setting(default, f"seconds {meaning}", low=low, high=86_400)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a server. The environment variable of a setting is its name in capitals.

    Raises `ConfigError`, one line that names the remedy, where a value is wrong.
    """

    # Required
    db_url: str = _setting("", "PostgreSQL URL or libpq connection string", secret=True)
    jwt_secret: str = _setting("", "key that tokens are verified with", secret=True)

    # Where it listens
    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8080, "TCP port; 0 takes a free one", low=0, high=65535)
    access_log: bool = _setting(False, "log each HTTP request, without its token: 1 or 0")

    # Who may connect
    jwt_algorithms: tuple[str, ...] = _setting(("HS256",), "accepted algorithms, comma-separated")
    allowed_origins: tuple[str, ...] = _setting(
        (), "browser origins that may connect, comma-separated; none: the server's own; *: all"
    )

    # Limits
    max_frame_size: int = _setting(8192, "bytes of one frame from a client", low=256, high=1 << 20)
    history_size: int = _setting(50, "messages sent on connect", low=1, high=200)
    max_replay: int = _setting(10_000, "messages sent at most for ?after=", low=1, high=1_000_000)
    max_in_flight: int = _setting(
        32, "messages of one client that wait for the database", low=1, high=1_000_000
    )
    max_pending: int = _setting(
        20_000, "messages of all clients that wait for the database", low=1, high=1_000_000
    )

    # Timeouts
    ping_interval: float = _seconds(54.0, "between pings to a client", low=0.05)
    pong_timeout: float = _seconds(60.0, "without a sign of life after which a client is dead", low=0.05)
    write_timeout: float = _seconds(10.0, "a client may read nothing before it is closed", low=0.05)
    db_timeout: float = _seconds(5.0, "for one query or connection attempt", low=0.1)
    store_timeout: float = _seconds(8.0, "a message is tried again while the database is away", low=0.1)
    shutdown_timeout: float = _seconds(10.0, "for a graceful shutdown", low=0.1)

    # Database
    db_pool_size: int = _setting(
        8, "connections for reading, beside two for writing and one to listen", low=1, high=1000
    )

    # Embedded PostgreSQL
    data_dir: str = _setting(".tollerchat", "directory of the embedded PostgreSQL, used without DB_URL")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(field.default, tuple):
                self._take_several(field.name)
            value, low, high = getattr(self, field.name), field.metadata["low"], field.metadata["high"]
            kind = type(field.default)
            if not isinstance(value, (int, float) if kind is float else kind):
                raise ConfigError(
                    f"{field.name.upper()} is of type {type(value).__name__}: it must be of {kind.__name__}"
                )
            if low is not None and not low <= value <= high:  # NaN is neither
                raise ConfigError(f"{field.name.upper()} is {value}: it must be {low} to {high}")
        self._check_database()
        self._check_tokens()
        self._check_origins()
        if self.pong_timeout <= self.ping_interval:
            raise ConfigError(
                f"PONG_TIMEOUT is {self.pong_timeout}: "
                f"it must be greater than PING_INTERVAL ({self.ping_interval})"
            )

    def _take_several(self, name: str) -> None:
        """Take a list for a tuple; but not one string, which would be taken for many of one letter."""
        value = getattr(self, name)
        if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) for each in value):
            raise ConfigError(f"{name} is {value!r}: it must be a tuple of strings")
        object.__setattr__(self, name, tuple(value))

    def _check_origins(self) -> None:
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin.lower()):
                raise ConfigError(
                    f"ALLOWED_ORIGINS has {origin!r}: it must be like https://chat.example.com, without a path, or *; "
                    "several are separated by commas"
                )
        object.__setattr__(self, "allowed_origins", tuple(map(_as_browsers_send_it, self.allowed_origins)))

    def _check_database(self) -> None:
        # What is wrong may be a part of the password, so it is not told.
        try:
            parts = psycopg2.extensions.parse_dsn(self.db_url)
        except psycopg2.ProgrammingError:
            raise ConfigError(
                "DB_URL is not a PostgreSQL URL: it must look like postgresql://user:password@host/database"
            ) from None
        ports = [port for port in parts.get("port", "").split(",") if port]
        if (
            not all(port.isdecimal() and 1 <= int(port) <= 65535 for port in ports)
            or "@" in parts.get("host", "")[1:]
        ):
            raise ConfigError(
                "DB_URL has no such host and port: a port is 1 to 65535, and in a password, / is %2F and @ is %40"
            )

    def _check_tokens(self) -> None:
        if not self.jwt_algorithms:
            raise ConfigError("JWT_ALGORITHMS is empty: it must name an algorithm, HS256 for example")
        known = jwt.algorithms.get_default_algorithms()
        for name in self.jwt_algorithms:
            if name not in known or name == "none":
                raise ConfigError(
                    f"JWT_ALGORITHMS has {name!r}: use one of {', '.join(sorted(set(known) - {'none'}))} "
                    "(more with pip install cryptography)"
                )
            if self.jwt_secret:
                try:
                    known[name].prepare_key(self.jwt_secret)
                except (jwt.InvalidKeyError, TypeError, ValueError):
                    raise ConfigError(
                        f"JWT_SECRET is not a key for {name}: set one, or JWT_ALGORITHMS"
                    ) from None

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> "Config":
        """Read the settings from environment variables; empty ones count as not set."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            text = environ.get(field.name.upper(), "")
            if text.strip():
                values[field.name] = _parse(field.name.upper(), text, field.default)
        return cls(**values)

    def require_db_url(self) -> None:
        """Raise `ConfigError` without `db_url`."""
        if not self.db_url:
            raise ConfigError('DB_URL is not set: export DB_URL="postgresql://user@host/database"')

    def require_jwt_secret(self) -> None:
        """Raise `ConfigError` without `jwt_secret`."""
        if not self.jwt_secret:
            raise ConfigError('JWT_SECRET is not set: export JWT_SECRET="$(openssl rand -hex 32)"')


def _as_browsers_send_it(origin: str) -> str:
    scheme = (origin := origin.lower()).partition(":")[0]
    return origin.removesuffix(_DEFAULT_PORTS.get(scheme, "/"))


def _parse(name: str, text: str, default: object) -> object:
    if isinstance(default, tuple):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        try:
            return {"1": True, "true": True, "0": False, "false": False}[text.strip().lower()]
        except KeyError:
            raise ConfigError(f"{name} is {text!r}: it must be 1 or 0") from None
    kind, what = (int, "a whole number") if isinstance(default, int) else (float, "a number of seconds")
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}: it must be {what}, for example {name}={default}") from None
