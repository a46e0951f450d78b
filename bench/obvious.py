"""The baseline: the chat server one would write in an afternoon with aiohttp and aiopg.

It has no acks, so a sender gets its own message like everybody else.
"""

import contextlib
import json
import os
from collections import defaultdict

import aiopg
import jwt
import uvloop
from aiohttp import WSMsgType, web

HISTORY = """
    SELECT content, user_id, channel_id, id, created_at FROM messages
    WHERE channel_id = %s ORDER BY id DESC LIMIT 50"""
INSERT = "INSERT INTO messages (channel_id, user_id, content) VALUES (%s, %s, %s) RETURNING id, created_at"

pool_key = web.AppKey("pool_key", aiopg.Pool)
rooms: dict[int, set[web.WebSocketResponse]] = defaultdict(set)


def encode(content, user_id, channel_id, message_id, created_at):
    return json.dumps(
        {
            "type": "message",
            "content": content,
            "user_id": user_id,
            "channel_id": channel_id,
            "message_id": message_id,
            "created_at": created_at.isoformat(timespec="microseconds"),
        }
    )


async def chat(request):
    try:
        token = request.headers["Authorization"].removeprefix("Bearer ")
        user_id = jwt.decode(token, os.environ["JWT_SECRET"], algorithms=["HS256"])["user_id"]
    except (KeyError, jwt.PyJWTError):
        raise web.HTTPUnauthorized from None
    channel_id = int(request.match_info["channel_id"])
    pool = request.app[pool_key]
    ws = web.WebSocketResponse(heartbeat=float(os.environ["PING_INTERVAL"]))
    await ws.prepare(request)
    async with pool.acquire() as connection, connection.cursor() as cursor:
        await cursor.execute(HISTORY, (channel_id,))
        rows = await cursor.fetchall()
    for row in reversed(rows):
        await ws.send_str(encode(*row))
    room = rooms[channel_id]
    room.add(ws)
    try:
        async for message in ws:
            if message.type is WSMsgType.TEXT:
                content = json.loads(message.data)["content"]
                async with pool.acquire() as connection, connection.cursor() as cursor:
                    await cursor.execute(INSERT, (channel_id, user_id, content))
                    message_id, created_at = await cursor.fetchone()
                text = encode(content, user_id, channel_id, message_id, created_at)
                for member in list(room):
                    with contextlib.suppress(ConnectionError):  # gone meanwhile
                        await member.send_str(text)
    finally:
        room.discard(ws)
    return ws


async def database(app):
    async with aiopg.create_pool(os.environ["DB_URL"], minsize=10, maxsize=10) as pool:
        app[pool_key] = pool
        yield


def main():
    app = web.Application()
    app.router.add_get("/ws/channel/{channel_id}", chat)
    app.cleanup_ctx.append(database)
    loop = uvloop.new_event_loop()  # the difference is not to be the loop
    web.run_app(app, host="127.0.0.1", port=int(os.environ["PORT"]), print=None, loop=loop)


if __name__ == "__main__":
    main()
