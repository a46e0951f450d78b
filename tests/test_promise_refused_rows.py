"""A row that the database does not take, for whatever reason, is nobody's business but its sender's."""

import asyncio
import dataclasses
import json
import re
import time
import uuid

import pytest

from tests.support import Template, psql, token, until
from tollerchat.app import hub_key
from tollerchat.logs import Seldom

pytestmark = pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"])

REFUSE = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.content LIKE 'bad%%' THEN RAISE SQLSTATE '{}'; END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER refuse BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION refuse()"""


# What is prepared is from before.
TERMINATE = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE application_name = 'tollerchat' AND datname = current_database()"""


@pytest.fixture
async def store_for_half_a_second(serve, config):
    return await serve(dataclasses.replace(config, store_timeout=0.5))


# A moderator's, and of those that may pass: a privilege, a conflict, a broken trigger, a limit, a cancelled query.
@pytest.mark.parametrize(
    ("sqlstate", "code"),
    [
        ("P0001", "invalid_content"),
        ("21000", "invalid_content"),
        ("42501", "unavailable"),
        ("40001", "unavailable"),
        ("42P01", "unavailable"),
        ("53400", "unavailable"),
        ("57014", "unavailable"),
        ("XX000", "unavailable"),
    ],
)
async def test_row_that_the_database_refuses_holds_up_nobody(
    store_for_half_a_second, database, sqlstate, code
):
    server = store_for_half_a_second
    (alice, _), (bob, _), (carol, _) = [await server.join(*at) for at in ((1, 1), (2, 1), (3, 2))]
    database.execute(REFUSE.format(sqlstate))
    start = time.monotonic()
    # All are in one batch, because the connection of the first message takes its time.
    await asyncio.gather(
        alice.send("bad", nonce="a"), bob.send("good", nonce="b"), carol.send("good", nonce="c")
    )
    assert [(await each.receive())["type"] for each in (bob, carol)] == ["ack", "ack"]
    assert time.monotonic() - start < 0.4
    frames = [await alice.receive() for _ in range(2)]
    (error,) = [frame for frame in frames if frame["type"] == "error"]
    assert (error["code"], error["nonce"]) == (code, "a")
    assert database.contents() == ["good"]


@pytest.fixture
def role(database):
    """A user of the database who may do no more than the server needs."""
    name = f"role_{uuid.uuid4().hex}"
    database.execute(f"CREATE ROLE {name} LOGIN")
    for kind in ("TABLES", "SEQUENCES"):
        database.execute(f"GRANT ALL ON ALL {kind} IN SCHEMA public TO {name}")
    yield name
    database.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def test_row_that_a_policy_forbids_is_refused_for_good(serve, config, database, role):
    database.execute(
        """ALTER TABLE messages ENABLE ROW LEVEL SECURITY;
        CREATE POLICY read ON messages FOR SELECT USING (true);
        CREATE POLICY write ON messages FOR INSERT WITH CHECK (content <> 'bad')"""
    )
    server = await serve(dataclasses.replace(config, db_url=re.sub("//[^@]*@", f"//{role}@", config.db_url)))
    (alice, _), (carol, _) = await server.join(1, 1), await server.join(3, 2)
    await asyncio.gather(alice.send("bad"), carol.send("good"))
    assert (await carol.receive())["type"] == "ack"
    assert (await alice.receive())["code"] == "invalid_content"


async def test_missing_privilege_is_nothing_that_a_sender_did(serve, config, database, role, caplog):
    """Its clients must not drop their messages, and the operator must be told."""
    database.execute(f"REVOKE INSERT ON messages FROM {role}")
    url = re.sub("//[^@]*@", f"//{role}@", config.db_url)
    server = await serve(dataclasses.replace(config, db_url=url, store_timeout=1))
    alice, _ = await server.join(1)
    await alice.send("one", nonce="n")
    assert (await alice.receive())["code"] == "unavailable"
    assert "permission denied for table messages" in caplog.text
    database.execute(f"GRANT INSERT ON messages TO {role}")
    await alice.send("one", nonce="n")
    assert (await alice.receive())["type"] == "ack"


# None of this is about a message, whatever PostgreSQL says; and what it says is for the operator to read.
@pytest.mark.parametrize(
    ("spoil", "mend", "told", "logged"),
    [
        (
            "INSERT INTO messages (id, channel_id, user_id, content) VALUES (2, 1, 9, 'old'), (100, 1, 9, 'newer');"
            "SELECT setval('messages_id_seq', 1)",
            "SELECT setval('messages_id_seq', 100)",
            "ack",  # each try takes an id
            'duplicate key value violates unique constraint "messages_pkey"',
        ),
        (
            "ALTER SEQUENCE messages_id_seq MAXVALUE 100; SELECT setval('messages_id_seq', 100)",
            "ALTER SEQUENCE messages_id_seq NO MAXVALUE",
            "unavailable",
            "nextval: reached maximum value of sequence",
        ),
        (
            "ALTER SEQUENCE messages_id_seq OWNED BY NONE",
            "ALTER SEQUENCE messages_id_seq OWNED BY messages.id",
            "unavailable",
            "messages.id has no sequence of its own",
        ),
        (
            "ALTER TABLE messages ADD origin TEXT NOT NULL",
            "ALTER TABLE messages ALTER origin DROP NOT NULL",
            "unavailable",
            "23502 origin",
        ),
        (
            "ALTER DATABASE {name} SET default_transaction_read_only = on",
            "ALTER DATABASE {name} SET default_transaction_read_only = off",
            "unavailable",
            "cannot execute INSERT in a read-only transaction",
        ),
    ],
    ids=["sequence behind", "sequence ends", "no sequence", "column", "read-only"],
)
async def test_fault_of_the_database_is_nothing_that_a_sender_did(
    serve, config, database, caplog, monkeypatch, spoil, mend, told, logged
):
    monkeypatch.setattr(Seldom, "INTERVAL", 0)
    name = config.db_url.split("/")[3].split("?")[0]
    database.execute("SET default_transaction_read_only = off")  # for this connection, whatever comes
    database.execute("SET session_replication_role = replica")
    for sql in spoil.format(name=name).split(";"):
        database.execute(sql)
    server = await serve(dataclasses.replace(config, store_timeout=0.2))
    alice, _ = await server.join(1)
    await alice.send("one", nonce="n")
    while (frame := await alice.receive())["type"] == "message":
        pass
    assert frame.get("code", frame["type"]) == told
    assert logged in caplog.text
    database.execute(mend.format(name=name))
    psql(config.db_url, TERMINATE)
    await until(lambda: server.app[hub_key].access.remembers)
    await server.app[hub_key].compare_with_log()
    alice, _ = await server.join(1)
    frame = {"type": "error"}
    while frame["type"] != "ack":  # the new connection may take longer than the message may wait
        await alice.send("one", nonce="n")
        frame = await alice.receive()
        assert frame.get("code") in (None, "unavailable")


async def test_post_that_the_database_does_not_take_for_now_is_unavailable(serve, config, database):
    """Not a bad request: it may be sent again."""
    server = await serve(dataclasses.replace(config, store_timeout=0.2))
    database.execute(REFUSE.format("55000"))
    async with server.session.post(
        f"{server.url}/channels/1/messages",
        data=json.dumps({"content": "bad"}),
        headers={"Authorization": f"Bearer {token()}"},
    ) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"


async def test_defaults_of_the_database_do_not_matter(serve, config, database):
    name = config.db_url.split("/")[3].split("?")[0]
    for setting in (
        "synchronous_commit = off",
        "statement_timeout = '20ms'",  # the trigger takes longer; to connect does not
        "default_transaction_isolation = serializable",
    ):
        database.execute(f"ALTER DATABASE {name} SET {setting}")
    database.execute(
        """CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_sleep(0.05);
            NEW.content := concat_ws(' ', current_setting('synchronous_commit'),
                current_setting('transaction_isolation'), current_setting('statement_timeout'));
            RETURN NEW;
        END $$;
        CREATE TRIGGER note BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION note()"""
    )
    server = await serve(config)
    alice, _ = await server.join(1)
    await alice.send("settings")
    assert (await alice.receive())["type"] == "ack"
    assert database.contents() == ["on read committed 6s"]
