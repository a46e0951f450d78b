-- Tables, indexes and triggers of tollerchat, for PostgreSQL 14 and later (tested on 16 and 18).
-- May be applied any number of times, also to a database that has the tables of the original Toller-Chat.

BEGIN;

-- One application at a time: the rest would wait for the table locks anyway, and could deadlock on them.
SELECT pg_advisory_xact_lock(1953459308, 0);

DO $$ BEGIN
    IF current_setting('server_encoding') <> 'UTF8' THEN
        RAISE 'the encoding of this database is %, it must be UTF8: create another one, with ENCODING UTF8',
            current_setting('server_encoding');
    END IF;
END $$;

CREATE TABLE IF NOT EXISTS users (
    id          SERIAL PRIMARY KEY,
    username    TEXT NOT NULL,
    created_at  TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP
);

CREATE TABLE IF NOT EXISTS channels (
    id          SERIAL PRIMARY KEY,
    name        TEXT NOT NULL,
    is_private  BOOLEAN NOT NULL DEFAULT false,
    created_at  TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP
);

CREATE TABLE IF NOT EXISTS channel_users (
    user_id     INT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    channel_id  INT NOT NULL REFERENCES channels (id) ON DELETE CASCADE,
    role        TEXT NOT NULL DEFAULT 'member',
    PRIMARY KEY (channel_id, user_id)
);

-- A long message stays in its row, up to a whole page, as it is: to compress it takes longer than all the rest of
-- storing it, and to have it elsewhere, than all the rest of reading it.
CREATE TABLE IF NOT EXISTS messages (
    id          BIGSERIAL PRIMARY KEY,
    channel_id  INT REFERENCES channels (id) ON DELETE CASCADE,
    user_id     INT REFERENCES users (id) ON DELETE CASCADE,
    content     TEXT NOT NULL,
    created_at  TIMESTAMPTZ DEFAULT CURRENT_TIMESTAMP,
    nonce       TEXT
) WITH (toast_tuple_target = 8160);

-- Servers that listen: a random number of each, which each holds an advisory lock of for as long as it does. Without
-- WAL: after a crash of PostgreSQL, all have to connect again anyway.
CREATE UNLOGGED TABLE IF NOT EXISTS tollerchat_servers (
    id  INT PRIMARY KEY
);

-- All locks at once, or none, and then again: who waits for a lock stops all who come behind, and who has one and
-- waits for another can deadlock. It waits a little longer each time, for those who never leave a gap. Readers are in
-- the way only of an upgrade; and who may not lock all tables gets the locks below one by one.
DO $$
DECLARE
    is_upgrade CONSTANT boolean := EXISTS (
        SELECT FROM pg_trigger WHERE tgrelid = 'messages'::regclass AND tgname = 'tollerchat_messages_inserted'
    ) OR NOT EXISTS (
        SELECT FROM pg_attribute WHERE attrelid = 'messages'::regclass AND attname = 'nonce' AND NOT attisdropped
    );
    mode CONSTANT text := CASE WHEN is_upgrade THEN 'ACCESS EXCLUSIVE' ELSE 'SHARE ROW EXCLUSIVE' END;
    lock_timeout CONSTANT text := current_setting('lock_timeout');
    patience int := 200;  -- milliseconds
BEGIN
    LOOP
        BEGIN
            PERFORM set_config('lock_timeout', patience || 'ms', true);
            EXECUTE format('LOCK TABLE users, channels, channel_users, messages IN %s MODE', mode);
            EXIT;
        EXCEPTION
            WHEN insufficient_privilege THEN
                EXIT;
            WHEN lock_not_available OR deadlock_detected THEN
                RAISE NOTICE 'the tables are in use: trying again to lock them';
                PERFORM pg_sleep(0.5);
                patience := least(patience * 1.5, 5000);
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', lock_timeout, true);
END $$;

-- Upgrade of the original's tables: ids outgrow INT, and its timestamps carry no zone (they are read as UTC).
DO $$
DECLARE
    type_of CONSTANT jsonb := (
        SELECT jsonb_object_agg(attname, format_type(atttypid, NULL))
        FROM pg_attribute WHERE attrelid = 'messages'::regclass AND attnum > 0 AND NOT attisdropped
    );
    sequence CONSTANT text := pg_get_serial_sequence('messages', 'id');
BEGIN
    IF sequence IS NULL THEN
        RAISE 'messages.id has no sequence of its own: ALTER SEQUENCE ... OWNED BY messages.id';
    END IF;
    IF type_of ->> 'id' = 'integer' THEN
        ALTER TABLE messages ALTER COLUMN id TYPE BIGINT;
        EXECUTE format('ALTER SEQUENCE %s AS BIGINT', sequence);
    END IF;
    IF type_of ->> 'created_at' = 'timestamp without time zone' THEN
        ALTER TABLE messages ALTER COLUMN created_at TYPE TIMESTAMPTZ USING created_at AT TIME ZONE 'UTC';
    END IF;
    IF type_of ->> 'nonce' IS NULL THEN
        ALTER TABLE messages ADD COLUMN nonce TEXT;
    END IF;

    -- Ids that a session keeps for later would come after greater ones. Servers take an altered sequence for one that
    -- starts again, so it is not altered without need.
    IF EXISTS (
        SELECT FROM pg_sequence WHERE seqrelid = sequence::regclass
        AND (seqincrement <> 1 OR seqcache <> 1 OR seqcycle)
    ) THEN
        EXECUTE format('ALTER SEQUENCE %s INCREMENT 1 CACHE 1 NO CYCLE', sequence);
    END IF;

    -- This trigger told servers what others store; now they tell each other.
    IF EXISTS (
        SELECT FROM pg_trigger WHERE tgrelid = 'messages'::regclass AND tgname = 'tollerchat_messages_inserted'
    ) THEN
        DROP TRIGGER tollerchat_messages_inserted ON messages;
        DROP FUNCTION tollerchat_messages_inserted();
    END IF;

    -- A channel that has members was meant for them alone.
    IF NOT EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = 'channels'::regclass AND attname = 'is_private' AND NOT attisdropped
    ) THEN
        ALTER TABLE channels ADD COLUMN is_private BOOLEAN NOT NULL DEFAULT false;
        UPDATE channels SET is_private = true WHERE id IN (SELECT channel_id FROM channel_users);
    END IF;
END $$;

CREATE INDEX IF NOT EXISTS messages_channel_id_id_idx ON messages (channel_id, id);
CREATE UNIQUE INDEX IF NOT EXISTS messages_nonce_idx
    ON messages (channel_id, user_id, nonce) WHERE nonce IS NOT NULL;
CREATE INDEX IF NOT EXISTS channel_users_user_id_idx ON channel_users (user_id);

-- Order: within one channel, ids are handed out in commit order, so that "everything after id N" is complete.
-- The server holds a channel's lock before it takes an id (and says so by this setting, to save the trigger);
-- every other writer, a trigger of somebody's too, gets both here: the lock, and then a new id. The one it has may be too small by now, and
-- a transaction whose snapshot is older than the lock could not tell; sequences do not mind snapshots.
-- All servers are told, once for each channel and transaction: PostgreSQL drops what a transaction notifies again.
CREATE OR REPLACE FUNCTION tollerchat_order() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(1953459308, NEW.channel_id);
    NEW.id := nextval(pg_get_serial_sequence(TG_RELID::regclass::text, 'id'));
    PERFORM pg_notify('tollerchat', 'grown ' || NEW.channel_id) WHERE NEW.channel_id IS NOT NULL;
    RETURN NEW;
END $$;

CREATE OR REPLACE TRIGGER tollerchat_order BEFORE INSERT ON messages
    FOR EACH ROW WHEN (current_setting('tollerchat.writer', true) IS DISTINCT FROM 'on' OR pg_trigger_depth() > 0)
    EXECUTE FUNCTION tollerchat_order();

-- Notifications: hints to every server process. Payload: a verb and its arguments, see tollerchat/bus.py.
-- Of what a server stores, it tells the others itself.
CREATE OR REPLACE FUNCTION tollerchat_messages_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('tollerchat', 'changed ' || channel_id)
    FROM (SELECT DISTINCT channel_id FROM changed WHERE channel_id IS NOT NULL) AS channel_ids;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION tollerchat_messages_moved() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('tollerchat', 'changed ' || channel_id)
    FROM (SELECT channel_id FROM changed UNION SELECT channel_id FROM moved) AS channel_ids
    WHERE channel_id IS NOT NULL;
    RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER tollerchat_messages_deleted AFTER DELETE ON messages
    REFERENCING OLD TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION tollerchat_messages_changed();

CREATE OR REPLACE TRIGGER tollerchat_messages_updated AFTER UPDATE ON messages
    REFERENCING OLD TABLE AS changed NEW TABLE AS moved
    FOR EACH STATEMENT EXECUTE FUNCTION tollerchat_messages_moved();

CREATE OR REPLACE FUNCTION tollerchat_channel_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        PERFORM pg_notify('tollerchat', 'deleted ' || OLD.id);
    ELSE
        PERFORM pg_notify('tollerchat', 'access ' || OLD.id);
    END IF;
    RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER tollerchat_channel_deleted AFTER DELETE ON channels
    FOR EACH ROW EXECUTE FUNCTION tollerchat_channel_changed();

CREATE OR REPLACE TRIGGER tollerchat_channel_closed AFTER UPDATE ON channels
    FOR EACH ROW WHEN (NEW.is_private AND NOT OLD.is_private)
    EXECUTE FUNCTION tollerchat_channel_changed();

CREATE OR REPLACE FUNCTION tollerchat_member_removed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('tollerchat', 'access ' || OLD.channel_id);
    RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER tollerchat_member_removed AFTER DELETE OR UPDATE ON channel_users
    FOR EACH ROW EXECUTE FUNCTION tollerchat_member_removed();

CREATE OR REPLACE FUNCTION tollerchat_user_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('tollerchat', 'user ' || OLD.id);
    RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER tollerchat_user_deleted AFTER DELETE ON users
    FOR EACH ROW EXECUTE FUNCTION tollerchat_user_deleted();

CREATE OR REPLACE FUNCTION tollerchat_truncated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('tollerchat', 'truncated');
    RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER tollerchat_truncated AFTER TRUNCATE ON messages
    FOR EACH STATEMENT EXECUTE FUNCTION tollerchat_truncated();
CREATE OR REPLACE TRIGGER tollerchat_truncated AFTER TRUNCATE ON channels
    FOR EACH STATEMENT EXECUTE FUNCTION tollerchat_truncated();
CREATE OR REPLACE TRIGGER tollerchat_truncated AFTER TRUNCATE ON channel_users
    FOR EACH STATEMENT EXECUTE FUNCTION tollerchat_truncated();
CREATE OR REPLACE TRIGGER tollerchat_truncated AFTER TRUNCATE ON users
    FOR EACH STATEMENT EXECUTE FUNCTION tollerchat_truncated();

-- Rows may have come with ids of their own, without the trigger, and what is new must have greater ones. Nobody can
-- take an id meanwhile: the table is locked.
DO $$
DECLARE
    sequence CONSTANT text := pg_get_serial_sequence('messages', 'id');
    newest CONSTANT bigint := (SELECT max(id) FROM messages);
BEGIN
    IF newest > coalesce(pg_sequence_last_value(sequence::regclass), 0) THEN
        PERFORM setval(sequence::regclass, newest);
    END IF;
END $$;

COMMIT;
