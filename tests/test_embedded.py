"""The embedded PostgreSQL, after ends and in places that it was not made for."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.support import psql
from tollerchat.embedded import UNFINISHED, keep_secret, run_postgres
from tollerchat.errors import ConfigError

EARLIER_RUN = """
import pathlib, shutil, sys
from tests.support import psql
from tollerchat.embedded import run_postgres
place = pathlib.Path(sys.argv[1])
with run_postgres(place) as url:
    psql(url, "CREATE TABLE kept ()")
    shutil.copy(place / "postgres/postmaster.pid", place / "pid")
"""

KILLED_RUN = """
import pathlib, sys, time
from tollerchat.embedded import run_postgres
with run_postgres(pathlib.Path(sys.argv[1])):
    print("runs", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def place():
    """A short path, for the socket's sake."""
    place = Path(tempfile.mkdtemp(prefix="tollerchat-"))
    yield place
    shutil.rmtree(place)


@pytest.fixture
def stranger():
    with subprocess.Popen(["sleep", "60"]) as stranger:
        yield stranger
        stranger.kill()


def test_pid_of_a_crashed_server_that_is_anothers_now_is_not_taken_for_it(place, stranger):
    subprocess.run([sys.executable, "-c", EARLIER_RUN, place], check=True)
    lines = (place / "pid").read_text().splitlines()
    (place / "postgres/postmaster.pid").write_text("\n".join([str(stranger.pid), *lines[1:]]))
    with run_postgres(place) as url:
        assert psql(url, "SELECT count(*) FROM kept") == [(0,)]
        assert (place / "postgres/postmaster.pid").read_text().split()[0] != str(stranger.pid)
    assert stranger.poll() is None


def test_first_start_that_was_cut_off_does_not_matter(place):
    for name in (f"{UNFINISHED}x", "postgres.bak"):
        (place / name).mkdir()
        (place / name / "PG_VERSION").write_text("18\n")
    with run_postgres(place) as url:
        assert psql(url, "SELECT 1") == [(1,)]
    assert sorted(path.name for path in place.iterdir()) == ["lock", "postgres", "postgres.bak"]


@pytest.mark.parametrize(("version", "pid"), [("18\n", "-8165"), ("18\n", ""), ("", "1")])
def test_cluster_that_cannot_be_started_is_an_error_of_one_line(place, version, pid):
    (place / "postgres").mkdir()
    (place / "postgres/PG_VERSION").write_text(version)
    (place / "postgres/postmaster.pid").write_text(pid)
    with pytest.raises(ConfigError, match=f"cannot use {place}.*set DATA_DIR") as info, run_postgres(place):
        pass
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", ["my chat", "it's", "a&b", "$(touch x)", "50%"])
def test_path_that_a_shell_would_take_apart_is_refused(place, name):
    with pytest.raises(ConfigError, match=r"has spaces.*set DATA_DIR"), run_postgres(place / name):
        pass
    assert not list(place.iterdir())


def test_place_that_is_no_directory_is_refused(place):
    (place / "file").write_text("")
    with pytest.raises(ConfigError, match="set DATA_DIR to another directory"), run_postgres(place / "file"):
        pass
    with pytest.raises(ConfigError, match="DATA_DIR cannot be used"):
        keep_secret(place / "file")


def test_secret_is_the_same_every_time_and_for_its_owner_alone(place):
    secret = keep_secret(place / "new")
    assert len(secret) == 64
    assert keep_secret(place / "new") == secret
    assert [path.name for path in (place / "new").iterdir()] == ["jwt_secret"]
    assert (place / "new/jwt_secret").stat().st_mode & 0o777 == 0o600


def test_secret_that_many_make_at_once_is_one(place):
    code = "import sys, pathlib; from tollerchat.embedded import keep_secret; print(keep_secret(pathlib.Path(sys.argv[1])))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, place], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    told = {process.communicate(timeout=30)[0] for process in processes}
    assert told == {keep_secret(place) + "\n"}


def test_server_that_lives_on_is_found_also_behind_a_link(place):
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    (place / "postgres").symlink_to(elsewhere / "postgres")
    pid_file = elsewhere / "postgres/postmaster.pid"
    with subprocess.Popen([sys.executable, "-c", KILLED_RUN, place], stdout=subprocess.PIPE) as earlier:
        assert earlier.stdout.readline() == b"runs\n"
        pid = pid_file.read_text().split()[0]
        earlier.kill()
    with run_postgres(place) as url:
        assert psql(url, "SELECT 1") == [(1,)]
        assert pid_file.read_text().split()[0] == pid
    assert not pid_file.exists()


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGINT]])
def test_server_that_is_stopped_while_it_starts_leaves_no_postgres_behind(place, numbers):
    environ = {name: value for name, value in os.environ.items() if name not in ("DB_URL", "JWT_SECRET")}
    environ |= {"DATA_DIR": str(place), "PORT": "0"}
    pid_file = place / "postgres/postmaster.pid"
    with subprocess.Popen([sys.executable, "-m", "tollerchat"], env=environ) as server:
        deadline = time.monotonic() + 30
        while not pid_file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        for number in numbers:
            server.send_signal(number)
        assert server.wait(30) in {128 + number for number in numbers}
    assert not pid_file.exists()
