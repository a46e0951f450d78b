"""Fixtures: one PostgreSQL cluster per run, a fresh database per test, factories that clean up."""

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
import uuid
from pathlib import Path

import aiohttp
import hypothesis
import psycopg2
import pytest

from tests.support import SECRET, Database, Server, Template, psql
from tollerchat import Config
from tollerchat.embedded import run_postgres
from tollerchat.logs import Seldom

CLUSTER_VARIABLE = "TOLLERCHAT_TEST_CLUSTER"

_cluster = contextlib.ExitStack()

# How fast examples are made is about the machine, not about what is tested.
hypothesis.settings.register_profile(
    "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")


def pytest_configure(config):
    """Start the cluster in the first process; parallel workers inherit its URL."""
    if CLUSTER_VARIABLE in os.environ or hasattr(config, "workerinput"):
        return
    directory = Path(tempfile.mkdtemp(prefix="tollerchat-", dir=_memory()))
    _cluster.callback(os.environ.pop, CLUSTER_VARIABLE)
    _cluster.callback(shutil.rmtree, directory, ignore_errors=True)
    url = _cluster.enter_context(run_postgres(directory))
    os.environ[CLUSTER_VARIABLE] = url
    psql(url, "ALTER SYSTEM SET fsync = off")  # what survives a power cut is not tested here
    psql(url, "SELECT pg_reload_conf()")
    for template in Template:
        template.create(url)


def _memory():
    """A directory in memory, if there is one with enough space: each test makes and drops hundreds of files."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > 2 << 30 else None


def pytest_unconfigure(config):
    _cluster.close()


def pytest_asyncio_loop_factories(config, item):
    """The loop that the server runs on in production; TEST_LOOP=asyncio for the other one."""
    if sys.platform == "win32" or os.environ.get("TEST_LOOP") == "asyncio":
        return {"asyncio": asyncio.new_event_loop}
    import uvloop

    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def nothing_was_logged_before():
    """What one test had logged must not be left out of the log of the next."""
    for logger in logging.root.manager.loggerDict.values():
        for each in getattr(logger, "filters", ()):
            each = getattr(each, "_bad_requests", each)
            if isinstance(each, Seldom):
                each._said.clear()


@pytest.fixture(params=list(Template), ids=lambda template: template.value)
def database(request):
    """A database of its own, made by our schema.sql, or by the seed's tables and our schema.sql."""
    url = os.environ[CLUSTER_VARIABLE]
    name = f"test_{uuid.uuid4().hex}"
    psql(url, f"CREATE DATABASE {name} TEMPLATE {request.param.database}")
    with contextlib.closing(psycopg2.connect(url, dbname=name)) as connection:
        connection.autocommit = True
        yield Database(connection, url.replace("/postgres?", f"/{name}?"))
    psql(url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def config(database):
    return Config(db_url=database.url, jwt_secret=SECRET)


@pytest.fixture
async def serve(database):
    """Factory: run an application on a free port of 127.0.0.1, as a real server would.

    It asks for the database so that the servers are gone before their database is.
    """
    async with contextlib.AsyncExitStack() as stack:

        async def start(config=None, *, app=None, prefix="", port=0):
            return await stack.enter_async_context(Server.run(config, app=app, prefix=prefix, port=port))

        yield start


@pytest.fixture
async def session():
    """An HTTP client without a limit of connections."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


@pytest.fixture
async def server(serve, config):
    return await serve(config)
