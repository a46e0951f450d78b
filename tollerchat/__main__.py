"""The command line: `tollerchat [serve]`, `tollerchat token`, `tollerchat init-db`."""

import argparse
import asyncio
import contextlib
import dataclasses
import errno
import gc
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path

import psycopg2
from aiohttp import web

from tollerchat import __version__
from tollerchat.app import RUNNER_OPTIONS, create_app, drain
from tollerchat.auth import issue_token
from tollerchat.config import Config
from tollerchat.database import apply_schema, reason
from tollerchat.embedded import DEMO_USERS, STOP_SIGNALS, add_demo_data, keep_secret, run_postgres
from tollerchat.errors import ConfigError
from tollerchat.protocol import MAX_ID

__all__ = ("main",)

logger = logging.getLogger("tollerchat")

# Connections that wait to be accepted: all clients come back at once after a restart.
BACKLOG = 4096
DEMO_TTL = 30 * 24 * 3600  # seconds


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status. Settings come from the environment."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = Config.from_env()
        if arguments.command == "token":
            _print_token(config, arguments.user, arguments.ttl)
        elif arguments.command == "init-db":
            _init_db(config)
        else:
            _serve(config)
    except ConfigError as exc:
        print(f"tollerchat: {exc}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tollerchat",
        description="A real-time chat server. Settings come from the environment, see the README.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("serve", help="run the server (default); without DB_URL, on an embedded PostgreSQL")
    token = commands.add_parser("token", help="print a token, for trying things out")
    token.add_argument("--user", type=_positive, required=True, help="user id")
    token.add_argument(
        "--ttl", type=_positive, default=3600, help="seconds it is valid (default: %(default)s)"
    )
    commands.add_parser("init-db", help="make the tables in DB_URL, or upgrade them")
    return parser


def _positive(text: str) -> int:
    try:
        if 1 <= (number := int(text)) <= MAX_ID:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to {MAX_ID}")


def _with_secret(config: Config) -> Config:
    """Without a database of one's own, the secret of the embedded one will do."""
    if not config.jwt_secret and not config.db_url:
        return dataclasses.replace(config, jwt_secret=keep_secret(Path(config.data_dir)))
    config.require_jwt_secret()
    return config


def _print_token(config: Config, user_id: int, ttl: int) -> None:
    token = issue_token(user_id, _with_secret(config), ttl=ttl)
    if not config.jwt_secret:  # it may be meant for a server that has another one
        print(f"tollerchat: signed with the secret of {config.data_dir}", file=sys.stderr)
    print(token)


def _init_db(config: Config) -> None:
    config.require_db_url()
    try:
        apply_schema(config.db_url)
    except psycopg2.Error as exc:
        raise ConfigError(f"cannot set up the database of DB_URL: {reason(exc)}") from None
    print("the database is set up")


def _serve(config: Config) -> None:
    config = _with_secret(config)
    for number in STOP_SIGNALS:
        signal.signal(number, _exit)
    with contextlib.ExitStack() as stack:
        demo = not config.db_url
        if demo:
            url = stack.enter_context(run_postgres(Path(config.data_dir)))
            add_demo_data(url)
            config = dataclasses.replace(config, db_url=url)
        _run(_serve_until_stopped(config, demo=demo))


def _run(main: Coroutine[None, None, None]) -> None:
    if sys.platform == "win32":
        asyncio.run(main)
    else:
        import uvloop

        _raise_descriptor_limit()
        uvloop.run(main)


def _raise_descriptor_limit() -> None:
    """Take as many connections as the hard limit allows: the soft one is 1,024 on most systems."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # macOS allows less than its hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve_until_stopped(config: Config, *, demo: bool) -> None:
    stop = _stop_signal()
    app = create_app(config)
    access_log = logging.getLogger("aiohttp.access") if config.access_log else None
    runner = web.AppRunner(app, shutdown_timeout=1.0, access_log=access_log, **RUNNER_OPTIONS)
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.host, config.port, backlog=BACKLOG)
        try:
            await site.start()
        except (OSError, UnicodeError) as exc:
            number: int = getattr(exc, "errno", None) or 0
            # asyncio's own text is a long one.
            problem = os.strerror(number) if number in errno.errorcode else getattr(exc, "strerror", exc)
            raise ConfigError(
                f"cannot listen on {config.host}:{config.port} ({problem}): set HOST and PORT"
            ) from None
        base = f"http://{_netloc(runner)}"
        logger.info("listening on %s", base)
        _calm_garbage_collector()
        if demo:
            _print_links(config, base)
        await stop.wait()
        logger.info("shutting down")
        # Before the sites close: whoever comes now is told 503, and /health says so.
        await drain(app)
    finally:
        await runner.cleanup()


def _calm_garbage_collector() -> None:
    """Look for cyclic garbage less often, and not among what lives as long as the process.

    Connections leave none, and walking through all of them again and again was a third of what a storm
    of them cost.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def _netloc(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _print_links(config: Config, base: str) -> None:
    print("\nOpen these in two browser tabs, and chat with yourself:\n")
    for user_id, name in DEMO_USERS.items():
        token = issue_token(user_id, config, ttl=DEMO_TTL)
        print(f"  {name}:  {base}/#channel=1&token={token}\n")
    print(f"Messages are kept in {config.data_dir}/. Stop with Ctrl-C.\n", flush=True)


def _exit(number: int, _: object) -> None:
    """End the process in order, whoever else wants it to end: an embedded PostgreSQL must not stay behind."""
    for each in STOP_SIGNALS:
        signal.signal(each, lambda *_: None)
    sys.exit(128 + number)


def _stop_signal() -> asyncio.Event:
    """Set by the first of the signals; a second one ends the process before all clients have what they wait for."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def take() -> None:
        stop.set()
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, _exit)

    for number in STOP_SIGNALS:
        if sys.platform == "win32":
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
        else:
            loop.add_signal_handler(number, take)
    return stop


if __name__ == "__main__":
    sys.exit(main())
