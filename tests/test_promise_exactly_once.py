"""A message with a nonce is stored once, whatever happens to its sender, its answer or its server."""

import asyncio
import contextlib
import re
import socket
import time

import aiopg
import psycopg2
import pytest

from tests.checker import Log, check, rows_of
from tests.faults import Proxy, ServerProcess, in_thread, running
from tests.raw_client import RawClient
from tests.support import SECRET, Template, until
from tollerchat import Config, bus
from tollerchat.app import hub_key, repository_key, writer_key
from tollerchat.errors import Unavailable
from tollerchat.saving import LOCK_KEY

pytestmark = pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"])

SAVE = "EXECUTE tollerchat_save"  # in each query that stores


def message(nonce, content=None):
    return {"type": "message", "content": content or f"content of {nonce}", "nonce": nonce}


async def answers(client, count):
    """The next `count` answers to messages: (nonce, message_id or error code)."""
    found = []
    while len(found) < count:
        frame = await client.frame() if isinstance(client, RawClient) else await client.receive()
        assert frame is not None, "the connection ended"
        if frame["type"] in ("ack", "error"):
            found.append((frame.get("nonce"), frame.get("message_id") or frame["code"]))
    return found


@contextlib.asynccontextmanager
async def raw_client(server, user_id=1, **options):
    client = await RawClient.connect(server.port, user_id, **options)
    try:
        yield client
    finally:
        client.close()


async def test_nonce_repeated_in_one_burst_is_stored_once(server, database):
    bob, _ = await server.join(2)
    async with raw_client(server) as alice:
        await alice.send(*[message("a")] * 3, message("b"), *[message("a")] * 3, message("b"))
        acks = await answers(alice, 8)
    ids = dict(acks)
    assert sorted(acks) == sorted([("a", ids["a"])] * 6 + [("b", ids["b"])] * 2)
    assert [frame["message_id"] for frame in await bob.settled()] == [ids["a"], ids["b"]]
    assert database.contents() == ["content of a", "content of b"]


async def test_nonces_sent_over_several_connections_at_once_are_stored_once(server, database):
    bob, _ = await server.join(2)
    nonces = [f"n{n}" for n in range(20)]
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(raw_client(server)) for _ in range(4)]
        await asyncio.gather(*(client.send(*map(message, nonces)) for client in clients))
        ids = await asyncio.gather(*(answers(client, 20) for client in clients))
    assert len({frozenset(acks) for acks in ids}) == 1
    assert len(set(ids[0])) == 20
    assert sorted(database.contents()) == sorted(f"content of {nonce}" for nonce in nonces)
    assert len(await bob.settled()) == 20


async def test_nonce_is_known_after_a_reconnect(server, database):
    ids = set()
    for _ in range(3):
        async with raw_client(server) as alice:
            await alice.send(message("a"))
            ids.update(await answers(alice, 1))
    assert len(ids) == 1
    assert len(database.contents()) == 1


async def test_nonce_sent_without_waiting_for_the_ack_is_known_on_the_next_connection(server, database):
    for n in range(20):
        async with raw_client(server) as alice:
            await alice.send(message(f"n{n}"))
        async with raw_client(server) as alice:
            await alice.send(message(f"n{n}"))
            await answers(alice, 1)
    assert sorted(database.contents()) == sorted(f"content of n{n}" for n in range(20))


async def test_nonce_is_known_to_the_next_server(serve, config, database):
    ids = set()
    for _ in range(2):
        server = await serve(config)
        async with raw_client(server) as alice:
            await alice.send(message("a"))
            ids.update(await answers(alice, 1))
    assert len(ids) == 1
    assert len(database.contents()) == 1


async def test_two_servers_store_a_nonce_once(serve, config, database):
    servers = [await serve(config), await serve(config)]
    bob, _ = await servers[0].join(2)
    nonces = [f"n{n}" for n in range(20)]
    async with raw_client(servers[0]) as one, raw_client(servers[1]) as two:
        await asyncio.gather(*(client.send(*map(message, nonces)) for client in (one, two)))
        assert dict(await answers(one, 20)) == dict(await answers(two, 20))
    assert sorted(database.contents()) == sorted(f"content of {nonce}" for nonce in nonces)
    contents = []
    while len(contents) < 20:
        contents.append((await bob.receive())["content"])
    assert sorted(contents) == sorted(database.contents())


async def test_commit_whose_answer_is_lost_is_acked_once(serve, config, database):
    async with Proxy(database.url) as proxy:
        server = await serve(Config(db_url=proxy.url, jwt_secret=SECRET))
        (alice, _), (bob, _) = await server.join(1), await server.join(2)
        await alice.send_frame(message("first"))
        ids = await answers(alice, 1)
        proxy.lose = SAVE
        await alice.send_frame(message("lost"))
        ids += await answers(alice, 1)
        assert proxy.lost == 1
        assert [(await bob.receive())["message_id"] for _ in range(2)] == [
            message_id for _, message_id in ids
        ]
        database.insert("behind it")  # were its own message on the way, it would come before this
        assert [(await client.receive())["content"] for client in (alice, bob)] == ["behind it"] * 2
    assert database.contents() == ["content of first", "content of lost", "behind it"]


async def test_answers_lost_over_and_over_lose_and_repeat_nothing(serve, database):
    async with Proxy(database.url) as proxy:
        server = await serve(Config(db_url=proxy.url, jwt_secret=SECRET))
        bob, _ = await server.join(2)
        async with raw_client(server) as alice:
            for n in range(8):
                proxy.lose = SAVE
                await alice.send(*(message(f"{n}-{m}") for m in range(5)))
                assert len(dict(await answers(alice, 5))) == 5
            assert proxy.lost == 8
        frames = await bob.receive_many(40)
        frames += await bob.settled()
    rows = rows_of(database.url)
    log = Log(
        "bob", 2, after=0, events=[("received", bob.ready), *(("received", f) for f in frames)], complete=True
    )
    assert check([log], rows) is None
    assert len(rows) == 40


async def test_message_without_nonce_whose_answer_is_lost_is_not_sent_again(serve, database):
    """Nobody can tell whether it was stored; a second try might store it twice."""
    async with Proxy(database.url) as proxy:
        server = await serve(Config(db_url=proxy.url, jwt_secret=SECRET))
        (alice, _), (bob, _) = await server.join(1), await server.join(2)
        await alice.send("connects")
        await answers(alice, 1)
        proxy.lose = SAVE
        await alice.send("lost")
        answer = await answers(alice, 1)
        assert answer == [(None, "unavailable")] or isinstance(answer[0][1], int)
        assert [(await bob.receive())["content"] for _ in range(2)] == ["connects", "lost"]
    assert database.contents() == ["connects", "lost"]


@pytest.mark.parametrize("nonce", ["n", None])
async def test_sender_is_not_sent_its_message_though_it_was_told_unavailable(serve, database, nonce):
    """The commit's answer is lost, and the database is away until the writer gives up: the row is there all the same."""
    async with Proxy(database.url) as proxy:
        server = await serve(Config(db_url=proxy.url, jwt_secret=SECRET, store_timeout=0.1, db_timeout=0.5))
        (alice, _), (bob, _) = await server.join(1), await server.join(2)
        await alice.send("connects")
        await answers(alice, 1)
        proxy.lose, proxy.down = SAVE, True
        await alice.send("lost", **({"nonce": nonce} if nonce else {}))
        assert await answers(alice, 1) == [(nonce, "unavailable")]
        proxy.down = False
        assert [(await bob.receive())["content"] for _ in range(2)] == ["connects", "lost"]
        database.insert("behind it")
        assert (await bob.receive())["content"] == "behind it"
        assert [frame["content"] for frame in await alice.settled()] == ["behind it"]
        if nonce:
            await alice.send("lost", nonce=nonce)
            assert await answers(alice, 1) == [
                (nonce, database.execute("SELECT id FROM messages ORDER BY id")[1][0])
            ]
    assert database.contents() == ["connects", "lost", "behind it"]


async def test_nonce_sent_over_two_connections_that_were_told_unavailable_comes_to_neither(
    serve, database, monkeypatch
):
    """The row is found when the database is back; until then, nobody knows that it is there."""
    monkeypatch.setattr(bus, "PROBE_INTERVAL", 0.2)
    async with Proxy(database.url) as proxy:
        server = await serve(Config(db_url=proxy.url, jwt_secret=SECRET, store_timeout=0.1, db_timeout=0.5))
        clients = [(await server.join(1))[0], (await server.join(1))[0]]
        bob, _ = await server.join(2)
        await bob.send("connects")
        await answers(bob, 1)
        assert [await client.receive_contents(1) for client in clients] == [["connects"]] * 2
        proxy.lose, proxy.down, proxy.at_loss = SAVE, True, proxy.mute
        for client in clients:
            await client.send_frame(message("n"))
        for client in clients:
            assert await answers(client, 1) == [("n", "unavailable")]
        assert proxy.lost == 1
        proxy.down = False
        assert await bob.receive_contents(1) == ["content of n"]
        database.insert("behind it")
        assert await bob.receive_contents(1) == ["behind it"]
        for client in clients:
            assert [frame["content"] for frame in await client.settled()] == ["behind it"]
            await client.send_frame(message("n"))
            assert await answers(client, 1) == [("n", rows_of(database.url)[1].message_id)]
        assert await bob.settled() == []
    assert database.contents() == ["connects", "content of n", "behind it"]


async def test_database_over_tcp(serve, database):
    async with Proxy(database.url, tcp=True) as proxy:
        server = await serve(Config(db_url=proxy.url, jwt_secret=SECRET))
        (alice, _), (bob, _) = await server.join(1), await server.join(2)
        await alice.send_frame(message("sent"))
        ((_, sent),) = await answers(alice, 1)
        (foreign,) = database.insert("foreign")
        assert [frame["message_id"] for frame in await bob.receive_many(2)] == [sent, foreign]
        assert (await alice.receive())["message_id"] == foreign
        _, history = await server.join(3)
        assert [frame["content"] for frame in history] == ["content of sent", "foreign"]


async def test_address_that_refuses_is_not_the_last_one(serve, database):
    """As where localhost is ::1 too, or the first of a pair of databases is down."""
    async with Proxy(database.url, tcp=True) as proxy, Proxy(database.url, tcp=True) as dead:
        await dead.refuse()
        ports = [re.search(r":(\d+)/", url)[1] for url in (dead.url, proxy.url)]
        name = proxy.url.rsplit("/", 1)[1]
        db_url = f"postgresql://postgres@/{name}?host=127.0.0.1,127.0.0.1&port={','.join(ports)}"
        server = await serve(Config(db_url=db_url, jwt_secret=SECRET))
        alice, _ = await server.join(1)
        await alice.send_frame(message("sent"))
        assert len(await answers(alice, 1)) == 1


async def test_message_of_another_connection_under_a_nonce_in_use_is_not_hidden(server, database):
    """It reaches the room through the log, while one with other content waits for the database."""
    alice, _ = await server.join(1)
    with contextlib.closing(psycopg2.connect(database.url)) as other, other.cursor() as cursor:
        cursor.execute(
            "INSERT INTO messages (channel_id, user_id, content, nonce) VALUES (1, 1, 'theirs', 'n'), (1, 1, 'same', 'm')"
        )
        await alice.send_frame(message("n", "mine"))
        await alice.send_frame(message("m", "same"))
        await until(lambda: server.app[writer_key]._parked)
        other.commit()
    frames = [await alice.receive() for _ in range(3)]
    assert {(frame["type"], frame.get("code"), frame.get("content")) for frame in frames} == {
        ("error", "nonce_conflict", None),
        ("ack", None, None),
        ("message", None, "theirs"),
    }
    database.insert("behind it")
    assert (await alice.receive())["content"] == "behind it"


async def test_answers_without_a_nonce_come_in_the_order_of_the_messages(server, database, monkeypatch):
    """Also of those that are not taken, because the server stops, or too many wait."""
    alice, _ = await server.join(1)
    writer = server.app[writer_key]
    submit, taken = writer.submit, iter([True, True, False, True])

    def take_some(message, sender):
        if not next(taken):
            raise Unavailable("too many")
        submit(message, sender)

    monkeypatch.setattr(writer, "submit", take_some)
    with contextlib.closing(psycopg2.connect(database.url)) as other, other.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s, 1)", (LOCK_KEY,))
        for n in range(4):
            await alice.send(f"m{n}")
        (client,) = server.app[hub_key].rooms[1].audience.clients
        await until(lambda: client.outbox is not None and client.outbox.is_refusing)
        other.rollback()
    assert [(await alice.receive())["type"] for _ in range(4)] == ["ack", "ack", "error", "error"]
    await alice.send("m4")
    assert (await alice.receive())["type"] == "ack"
    assert database.contents() == ["m0", "m1", "m4"]


async def test_address_that_does_not_answer_is_waited_for_once(serve, database):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with Proxy(database.url, tcp=True) as proxy:
            port, name = re.search(r":(\d+)/(\w+)", proxy.url).groups()
            ports = f"{silent.getsockname()[1]},{port}"
            db_url = f"postgresql://postgres@/{name}?host=127.0.0.1,127.0.0.1&port={ports}"
            # Half of it is for the address that does not answer.
            server = await serve(Config(db_url=db_url, jwt_secret=SECRET, db_timeout=5))
            alice, _ = await server.join(1)
            await alice.send_frame(message("first"))
            await answers(alice, 1)
            access, readers = server.app[hub_key].access, server.app[repository_key]._readers
            for n in range(5):
                # A connection that is cut while it is being made would be a reason to ask all of them again.
                await until(lambda: access.remembers and len(readers._idle) == readers.size)
                await proxy.cut()
                start = time.monotonic()
                await alice.send_frame(message(f"{n}"))
                assert len(await answers(alice, 1)) == 1
                assert time.monotonic() - start < 2


async def test_first_address_is_asked_again_when_the_second_does_not_serve(serve, database):
    """As after falling back: it answers, but is read-only."""
    async with Proxy(database.url, tcp=True) as first, Proxy(database.url, tcp=True) as second:
        name = second.url.rsplit("/", 1)[1]
        ports = ",".join(re.search(r":(\d+)/", proxy.url)[1] for proxy in (first, second))
        server = await serve(
            Config(
                db_url=f"postgresql://postgres@/{name}?host=127.0.0.1,127.0.0.1&port={ports}",
                jwt_secret=SECRET,
            )
        )
        await first.refuse()
        alice, _ = await server.join(1)
        await alice.send_frame(message("over the second"))
        await answers(alice, 1)
        database.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        await second.cut()
        first.listen()
        await alice.send_frame(message("while it is read-only"))
        await until(lambda: first._reading)
        database.execute("SET default_transaction_read_only = off")
        database.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
        await first.cut()
        ((_, stored),) = await answers(alice, 1)
        assert isinstance(stored, int)


async def test_other_pools_of_the_process_are_aiopgs_own(database):
    name, host = re.search(r"/(\w+)\?host=([^&]+)", database.url).groups()
    async with (
        aiopg.create_pool(dbname=name, host=host, user="postgres") as pool,
        pool.acquire() as connection,
    ):
        assert type(connection) is aiopg.Connection


async def test_database_that_refuses_connections_leaves_no_trace(database, session):
    """uvloop must not go on watching the sockets of attempts that failed."""
    async with Proxy(database.url, tcp=True) as proxy, running(proxy.url) as server:
        health = f"{server.url}/health"

        async def answers_with(status):
            async with session.get(health) as response:
                return response.status == status

        assert await answers_with(200)
        for _ in range(3):
            await proxy.refuse()
            for _ in range(200):
                assert await answers_with(503)
            proxy.listen()
            deadline = time.monotonic() + 2
            while not await answers_with(200):
                assert time.monotonic() < deadline
        assert server.log().count("\n") < 50


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
async def test_connection_that_dies_with_a_query_unread_is_given_up_at_once(serve, database, tcp):
    """uvloop tells a reset once and no more, even if there is more to read: nothing must wait for that."""
    async with Proxy(database.url, tcp=tcp) as proxy:
        server = await serve(Config(db_url=proxy.url, jwt_secret=SECRET))
        alice, _ = await server.join(1)
        await alice.send_frame(message("connects"))
        await answers(alice, 1)
        start = time.monotonic()
        dying = asyncio.ensure_future(proxy.die_with_query_unread())
        await alice.send_frame(message("unread"))
        await dying
        assert [nonce for nonce, _ in await answers(alice, 1)] == ["unread"]
        assert time.monotonic() - start < 1
    assert database.contents() == ["content of connects", "content of unread"]


async def test_terminated_connections_under_load_store_each_nonce_once(server, database):
    """The database is there all the time, so nobody waits for a timeout: uvloop tells a reset only once."""
    bob, _ = await server.join(2)
    async with raw_client(server) as alice:
        for n in range(30):
            await alice.send(*(message(f"{n}-{m}") for m in range(5)))
            await asyncio.sleep(n % 5 / 1000)  # so that it meets every phase of a commit
            start = time.monotonic()
            database.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = 'tollerchat'"
            )
            assert len(dict(await answers(alice, 5))) == 5
            assert time.monotonic() - start < 2
    assert len(database.contents()) == len(set(database.contents())) == 150
    assert await bob.receive_contents(150) == database.contents()


async def test_nonce_is_known_after_the_server_was_killed(database):
    server = ServerProcess(database.url)
    try:
        ids = []
        for _ in range(2):
            await in_thread(server.start)
            async with raw_client(server) as alice:
                await alice.send(*(message(f"n{n}") for n in range(10)))
                ids.append(dict(await answers(alice, 10)))
            server.kill()
        assert ids[0] == ids[1]
    finally:
        server.close()
    assert len(database.contents()) == 10


async def test_other_content_under_a_nonce_is_a_conflict(server, database):
    bob, _ = await server.join(2)
    async with raw_client(server) as alice, raw_client(server) as phone:
        await alice.send(message("a", "one"), message("a", "two"), message("b"))
        assert dict(await answers(alice, 3))["a"] == "nonce_conflict"  # the later answer
        await phone.send(message("a", "two"), message("a", "one"))
        conflict, ack = await answers(phone, 2)
    assert conflict == ("a", "nonce_conflict")
    assert ack[1] == database.execute("SELECT id FROM messages WHERE nonce = 'a'")[0][0]
    assert database.contents() == ["one", "content of b"]
    assert len(await bob.settled()) == 2


async def test_nonce_belongs_to_one_user_and_one_channel(server, database):
    async with (
        raw_client(server) as one,
        raw_client(server, 2) as two,
        raw_client(server, channel_id=2) as other,
    ):
        for client, content in [(one, "one"), (two, "two"), (other, "other")]:
            await client.send(message("same", content))
            assert isinstance((await answers(client, 1))[0][1], int)
    assert database.contents(1) == ["one", "two"]
    assert database.contents(2) == ["other"]


async def test_resend_while_catching_up_is_not_received_after_its_ack(server, database):
    """A client comes back, and sends again before it has been sent what it missed."""
    logs = []
    for connection in range(2):
        log = Log(f"connection {connection}", 1, after=0)
        async with raw_client(server, after=0) as alice:
            log.sent(message("a"))
            await alice.send(message("a"))
            while not {"ack", "ready"} <= {frame["type"] for _, frame in log.events}:
                log.received(await alice.frame())
        logs.append(log)
        database.insert(*(f"missed {connection} {n}" for n in range(300)))
    assert check(logs, rows_of(database.url)) is None


async def test_message_whose_answer_was_lost_reaches_the_others_soon(server, database, monkeypatch):
    """A lone server is not notified of its own commits."""
    repository = server.app[repository_key]
    save_messages = repository.save_messages

    async def lose(batch, heads):
        await save_messages(batch, heads)
        raise Unavailable("the answer was lost", sent=True)

    (alice, _), (bob, _) = await server.join(1), await server.join(2)
    await until(lambda: database.execute("SELECT 1 FROM tollerchat_servers"))
    monkeypatch.setattr(repository, "save_messages", lose)
    start = time.monotonic()
    await alice.send("in doubt")
    assert (await alice.receive())["code"] == "unavailable"
    assert await bob.receive_contents(1) == ["in doubt"]
    assert time.monotonic() - start < bus.PROBE_INTERVAL / 2
    assert await alice.settled() == []
