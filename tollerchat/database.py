"""Connections to the database that serves us, what failures of queries mean, and schema.sql."""

import contextlib
import logging
from importlib import resources
from typing import Final

import psycopg2

from tollerchat.config import Config
from tollerchat.connection import Connection, ConnectionWatch, connect
from tollerchat.errors import ChatError, InvalidContent, NotFound, NotStored, Unavailable
from tollerchat.logs import Seldom

__all__ = (
    "any_time",
    "apply_schema",
    "explain",
    "explain_refusal",
    "has_answered",
    "is_of_rows",
    "open_connection",
    "read_schema",
    "reason",
    "rfc3339",
)

logger = logging.getLogger("tollerchat.database")
logger.addFilter(Seldom())  # it may be about many at once

# What we rely on, whatever the database's defaults are: a snapshot for each statement; and indexes, because
# a planner that knows nothing of a new table would sort a channel for each page.
_SETTINGS: Final = """
    SET default_transaction_isolation = 'read committed';
    SET enable_seqscan = off; SET enable_bitmapscan = off;
    SET statement_timeout = %s"""

_TIME_FORMAT: Final = """'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'"""

# Errors that may be about a single row of a batch, by class (PostgreSQL's manual, appendix A). Some are final:
# of data, constraints, routines, views, limits, triggers, policies.
_REFUSALS = ("21", "22", "23", "38", "39", "44", "54", "P0")
# Others may pass: conflicts between transactions, objects in use, cancelled queries, internal errors.
_PASSING = ("40", "55", "57014", "XX")


# Where errors come from that are of no row, whatever their class: the queue of notifications is full; ids of messages,
# or of transactions, have run out.
_OF_ALL = ("PreCommit_Notify", "nextval_internal", "GetNewTransactionId", "GetNewMultiXactId")


def rfc3339(time: str) -> str:
    """SQL for a timestamptz as RFC 3339 has it, in UTC."""
    return f"to_char({time} AT TIME ZONE 'UTC', {_TIME_FORMAT})"


def any_time(time: str) -> str:
    """SQL for a timestamptz of somebody else, who may have given none, or one that RFC 3339 has not."""
    return f"""least(greatest(coalesce({time}, 'epoch'), '0001-01-01 00:00:00+00'),
        timestamptz '9999-12-31 23:59:59.999999+00')"""


async def open_connection(config: Config, watch: ConnectionWatch) -> Connection:
    """Connect, independently of the database's defaults. Raises one of `FAILURES`."""
    connection = await connect(config.db_url, timeout=config.db_timeout)
    try:
        watch.add(connection)
        # Longer than we wait: it ends queries, and frees their connections, that nobody waits for any more.
        await connection.query(_SETTINGS, (f"{1000 * config.db_timeout + 1000:.0f}ms",))
    except BaseException:
        connection.close()
        raise
    return connection


def has_answered(conn: Connection | None, exc: Exception) -> bool:
    """Whether an error came from the database, and not from a connection that failed."""
    return conn is not None and not conn.closed and _is_answer(exc)


def _is_answer(exc: Exception) -> bool:
    return isinstance(exc, psycopg2.Error) and exc.pgcode is not None


def explain(exc: Exception, conn: Connection | None) -> Unavailable:
    """What a failure on a connection means; without one, nothing was sent."""
    if isinstance(exc, psycopg2.ProgrammingError):
        logger.error("the database refused a query: %s", reason(exc))
        if isinstance(exc, psycopg2.errors.InsufficientPrivilege):
            return Unavailable("the server lacks a privilege in the database")
        return Unavailable("the database is not set up: run tollerchat init-db")
    if _is_answer(exc) and (
        conn is None or not conn.closed
    ):  # without one, it was refused while it was prepared
        logger.warning("the database could not run a query: %s", reason(exc))
        return Unavailable("the database could not run the query")
    logger.warning("the database is not reachable: %s", reason(exc))
    return Unavailable("the database is not reachable", sent=conn is not None)


def reason(exc: BaseException) -> str:
    """A line for the log: what failed, without what was in the query."""
    primary = exc.diag.message_primary if isinstance(exc, psycopg2.Error) else None
    text = primary or str(exc).strip().partition("\n")[0] or type(exc).__name__
    return f"{text}: run tollerchat init-db" if isinstance(exc, psycopg2.errors.UndefinedTable) else text


def is_of_rows(exc: psycopg2.Error) -> bool:
    """Whether an answer may be about single rows."""
    if exc.diag.source_function in _OF_ALL or exc.diag.constraint_name == "messages_pkey":
        return False
    of_trigger = exc.diag.context is not None
    return of_trigger or _is_of_policy(exc) or str(exc.pgcode).startswith((*_REFUSALS, *_PASSING))


def _is_of_policy(exc: psycopg2.Error) -> bool:
    # By its code alone, 42501, it could be a privilege that we lack.
    return bool(exc.diag.source_function == "ExecWithCheckOptions")


def explain_refusal(exc: psycopg2.Error) -> ChatError:
    """Why the database did not take a message."""
    if isinstance(exc, psycopg2.errors.ForeignKeyViolation):
        return NotFound("the channel or the user does not exist any more")
    # Not the whole text, which may quote the message.
    name = exc.diag.constraint_name or exc.diag.column_name or ""
    logger.warning("the database refused a message: %s %s", exc.pgcode, name)
    is_final = (exc.pgcode or "").startswith(_REFUSALS) or _is_of_policy(exc)
    # No message can have what ours never have.
    if is_final and not isinstance(exc, psycopg2.errors.NotNullViolation):
        return InvalidContent("the database refused the message")
    return NotStored("the database could not store the message")


def read_schema() -> str:
    """The SQL of schema.sql."""
    return resources.files("tollerchat").joinpath("schema.sql").read_text("utf-8")


def apply_schema(db_url: str) -> None:
    """Apply schema.sql, however long it takes to rewrite large tables. Raises `psycopg2.Error`."""
    with contextlib.closing(psycopg2.connect(db_url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(read_schema())
