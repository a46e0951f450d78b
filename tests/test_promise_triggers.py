"""What a trigger of somebody else's writes, in the transaction that stores a message, goes live like any other row."""

import pytest

from tests.support import Template, until
from tollerchat import bus

pytestmark = pytest.mark.parametrize("database", [Template.FRESH], indirect=True, ids=["fresh"])


def answer_with(database, statements):
    """Have a trigger run this for each message that is not of user 9."""
    database.execute(
        f"""CREATE FUNCTION answer() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF NEW.user_id <> 9 THEN {statements} END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER answer AFTER INSERT ON messages FOR EACH ROW EXECUTE FUNCTION answer()"""
    )


async def test_answer_of_a_trigger_comes_at_once_to_its_channel_and_to_others(server, database, monkeypatch):
    monkeypatch.setattr(bus, "PROBE_INTERVAL", 3600)  # nothing is found by comparison
    answer_with(
        database,
        """INSERT INTO messages (channel_id, user_id, content)
        SELECT id, 9, NEW.content || '!' FROM unnest(ARRAY[1, 2]) AS id;""",
    )
    (alice, _), (bob, _), (carol, _) = [
        await server.join(1),
        await server.join(2),
        await server.join(3, channel_id=2),
    ]
    for n in range(3):
        await alice.send(f"hello {n}")
        assert [frame["type"] for frame in await alice.receive_many(2)] == ["ack", "message"]
        assert await bob.receive_contents(2) == [f"hello {n}", f"hello {n}!"]
        assert await carol.receive_contents(1) == [f"hello {n}!"]


async def test_answer_of_a_slow_trigger_is_not_overtaken(server, database):
    """Else it would have a smaller id than what those in its channel have seen by then."""
    database.execute("CREATE TABLE gate (is_open bool)")
    answer_with(
        database,
        """INSERT INTO messages (channel_id, user_id, content) VALUES (2, 9, 'answer');
        WHILE NOT EXISTS (SELECT FROM gate) LOOP PERFORM pg_sleep(0.005); END LOOP;""",
    )
    (alice, _), (bob, _) = await server.join(1), await server.join(2, channel_id=2)
    ((before,),) = database.execute("SELECT last_value FROM messages_id_seq")
    await alice.send("hello")
    await until(
        lambda: database.execute("SELECT last_value > %s FROM messages_id_seq", before + 1) == [(True,)]
    )
    other, _ = await server.join(9, channel_id=2)
    await other.send("more")
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = current_database()"
    await until(lambda: database.contents(2) or database.execute(waits))
    database.execute("INSERT INTO gate VALUES (true)")
    assert await bob.receive_contents(2) == database.contents(2) == ["answer", "more"]
