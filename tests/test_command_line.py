"""The command line: settings from the environment, one line for each that is missing or wrong."""

import os
import subprocess
import sys

import pytest

from tests.support import SECRET, SEED_DDL
from tollerchat import Config
from tollerchat.auth import issue_token, verify_token
from tollerchat.errors import ConfigError


def run(*arguments, **settings):
    names = ("DB_URL", "JWT_SECRET", "PORT", "DATA_DIR")
    environ = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-m", "tollerchat", *arguments],
        env={**environ, **settings},
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"DB_URL": "postgresql://localhost/x"}, "JWT_SECRET is not set: export JWT_SECRET="),
        ({"DB_URL": "nonsense secret"}, "DB_URL is not a PostgreSQL URL: it must look like"),
        (
            {"DB_URL": "postgresql://localhost:port/x"},
            "DB_URL has no such host and port: a port is 1 to 65535",
        ),
        ({"DB_URL": "postgresql://a:5432,b:0/x"}, "DB_URL has no such host and port: a port is 1 to 65535"),
        ({"DB_URL": "postgresql://u:secret/x@host/x"}, "in a password, / is %2F and @ is %40"),
        ({"DB_URL": "postgresql://u:a@secret@host/x"}, "in a password, / is %2F and @ is %40"),
        ({"PORT": "x"}, "PORT is 'x': it must be a whole number"),
        ({"PORT": "65536"}, "PORT is 65536: it must be 0 to 65535"),
        ({"PING_INTERVAL": "nan"}, "PING_INTERVAL is nan: it must be 0.05 to 86400"),
        ({"DB_TIMEOUT": "inf"}, "DB_TIMEOUT is inf: it must be 0.1 to 86400"),
        ({"MAX_REPLAY": "1" + 30 * "0"}, "it must be 1 to 1000000"),
        ({"ALLOWED_ORIGINS": "https://a.example, b.example"}, "has 'b.example': it must be like https://"),
        ({"ALLOWED_ORIGINS": "https://a.example/"}, "it must be like https://"),
        ({"PING_INTERVAL": "70"}, "PONG_TIMEOUT is 60.0: it must be greater than PING_INTERVAL"),
        ({"JWT_ALGORITHMS": "none"}, "JWT_ALGORITHMS has 'none': use one of"),
        ({"ACCESS_LOG": "maybe"}, "ACCESS_LOG is 'maybe': it must be 1 or 0"),
    ],
)
def test_wrong_setting_is_one_line_that_names_the_remedy(settings, remedy):
    result = run(**settings)
    assert result.returncode == 2
    assert remedy in result.stderr
    assert result.stderr.count("\n") == 1
    assert "secret" not in result.stderr


def test_printed_token_is_accepted_until_its_time_is_over():
    result = run("token", "--user", "7", "--ttl", "60", JWT_SECRET=SECRET)
    assert verify_token(result.stdout.strip(), Config(jwt_secret=SECRET)).user_id == 7


def test_token_without_a_secret_of_ones_own_says_whose_it_is(tmp_path):
    result = run("token", "--user", "7", DATA_DIR=str(tmp_path))
    secret = (tmp_path / "jwt_secret").read_text()
    assert verify_token(result.stdout.strip(), Config(jwt_secret=secret)).user_id == 7
    assert result.stderr == f"tollerchat: signed with the secret of {tmp_path}\n"


def test_init_db_upgrades_the_originals_tables_and_may_be_repeated(database):
    database.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    database.execute(SEED_DDL)
    for _ in range(2):
        assert run("init-db", DB_URL=database.url).returncode == 0
    assert database.execute("SELECT nonce FROM messages") == []


def test_init_db_without_a_database_says_so():
    assert "DB_URL is not set" in run("init-db").stderr
    assert "cannot set up the database" in run("init-db", DB_URL="postgresql://127.0.0.1:1/x").stderr


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such limit")
def test_server_takes_as_many_descriptors_as_it_may():
    """Most systems give 1,024 to begin with, which would be the most connections."""
    code = """if True:
        import resource
        from tollerchat.__main__ import _run
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        async def serve():
            print(resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard))
        _run(serve())"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=30) == "True\n"


@pytest.mark.parametrize(
    "arguments", [("--user", "0"), ("--user", "99999999999"), ("--user", "1", "--ttl", "-5")]
)
def test_token_that_the_server_would_refuse_is_not_made(arguments):
    result = run("token", *arguments, JWT_SECRET=SECRET)
    assert result.returncode == 2
    assert "is not a whole number from 1 to 2147483647" in result.stderr


def test_key_that_can_only_verify_is_told_when_it_shall_sign(monkeypatch):
    def sign(*_, **__):
        raise AttributeError("'RSAPublicKey' object has no attribute 'sign'")

    monkeypatch.setattr("jwt.encode", sign)
    with pytest.raises(ConfigError, match="needs the private key"):
        issue_token(1, Config(jwt_secret=SECRET), ttl=60)
