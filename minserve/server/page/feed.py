"""`GET /page/feed`: what the page shows, as a stream of frames while somebody looks.

Each feed asks the engine by itself for what happened since its own last frame, and waits until that
frame is on its way before it asks again. So a slow reader gets fewer and larger frames, nothing
queues up for it, and an engine that nobody looks at is not asked.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from minserve.activity import Activity, Cursor
from minserve.server.engine_face import EngineFace
from minserve.server.errors import RETRY_AFTER, HttpError
from minserve.server.page.frames import about, frame
from minserve.server.sse import EventStream

# Seconds between two looks, and between two frames where nothing has happened.
FRAME_S = 0.25
IDLE_FRAME_S = 1.0
MAX_FEEDS = 16
MAX_FRAMES = 10**6
_NUMBER = re.compile(r"[0-9]{1,7}")


class Feeds:
    """The feeds that are open now.

    Args:
        find_engine: returns the engine to ask; raises while there is none.
        find_name: returns the model's name in the API.
    """

    def __init__(self, find_engine: Callable[[], EngineFace], find_name: Callable[[], str]) -> None:
        self._find_engine, self._find_name = find_engine, find_name
        self._closed = asyncio.Event()
        self.num_open = 0

    async def close(self, app: web.Application) -> None:
        """End all feeds, since the server ends."""
        self._closed.set()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Send frames until the reader leaves, or as many as it asks for.

        Raises:
            HttpError: 400 for a wrong parameter, 429 where too many feeds are open.
        """
        left, engine = _frames_asked(request), self._find_engine()
        if self.num_open >= MAX_FEEDS:
            raise HttpError(
                429,
                f"{MAX_FEEDS} readers have this feed open, the most that it may have",
                kind="rate_limit_error",
                code="too_many_feeds",
                headers=RETRY_AFTER,
            )
        self.num_open += 1
        try:
            return await self._send(request, engine, left)
        finally:
            self.num_open -= 1

    async def _send(
        self, request: web.Request, engine: EngineFace, left: int | None
    ) -> web.StreamResponse:
        events = EventStream(request)
        head: dict[str, Any] = {"about": about(engine, self._find_name())}
        seen: dict[str, Cursor] = {}
        sent_s = -IDLE_FRAME_S
        while left is None or left > 0:
            activities = await engine.activity_by_replica(seen)
            now = time.monotonic()
            if _has_news(activities, seen) or now - sent_s >= IDLE_FRAME_S:
                if any(one.is_whole for one in activities.values()):
                    # All lanes at once take milliseconds, and no stream should wait for it.
                    told = await asyncio.to_thread(frame, engine, activities)
                else:
                    told = frame(engine, activities)
                await events.send({**head, **told})
                seen |= {name: Cursor(one.source, one.tick) for name, one in activities.items()}
                head, sent_s = {}, now
                left = None if left is None else left - 1
            if left == 0 or await self._is_closed_within(FRAME_S):
                break
        await events.response.write_eof()
        return events.response

    async def _is_closed_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._closed.wait(), seconds)
        except TimeoutError:
            return False
        return True


def _has_news(activities: Mapping[str, Activity], seen: Mapping[str, Cursor]) -> bool:
    return any(
        name not in seen or seen[name] != (one.source, one.tick) for name, one in activities.items()
    )


def _frames_asked(request: web.Request) -> int | None:
    """Return the number of frames after which the feed ends; ``None`` for no end.

    Raises:
        HttpError: for another parameter, or a number out of its range.
    """
    for name in request.query:
        if name != "frames":
            raise HttpError(400, f"there is no parameter {name!r}; known: frames", param=name)
    texts = request.query.getall("frames", [])
    if not texts:
        return None
    if len(texts) > 1:
        raise HttpError(400, "frames is given twice", param="frames")
    (text,) = texts
    if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= MAX_FRAMES:
        raise HttpError(
            400, f"frames must be a whole number from 1 to {MAX_FRAMES}", param="frames"
        )
    return int(text)
