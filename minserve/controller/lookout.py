"""`Lookout`: asks replicas what they did lately, for people who look at them.

Nothing is kept here and no replica sends anything unasked, so that it costs nothing while nobody
looks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from itertools import count

from minserve.activity import Activity, Cursor
from minserve.controller import messages as m
from minserve.controller.replicas import Replica

# Seconds to wait for answers. A replica that is lost or far behind is left out.
ANSWER_S = 1.0


class Lookout:
    """Sends looks, and brings the answers together. Belongs to one asyncio loop."""

    def __init__(self, replicas: SequenceOf[Replica]) -> None:
        self._replicas = replicas
        self._numbers = count()
        self._asked: dict[int, asyncio.Future[Activity]] = {}

    async def look(self, since: Mapping[str, Cursor]) -> Mapping[str, Activity]:
        """Return the activity of each connected replica that answers within `ANSWER_S`.

        Args:
            since: what was seen before, by the replica's number as text.
        """
        asked: dict[str, int] = {}
        loop = asyncio.get_running_loop()
        for replica in self._replicas:
            if replica.is_connected:
                name, number = str(replica.number), next(self._numbers)
                asked[name] = number
                self._asked[number] = loop.create_future()
                replica.post(m.Look(number=number, since=since.get(name)))
        answers = {name: self._asked[number] for name, number in asked.items()}
        try:
            if answers:
                await asyncio.wait(answers.values(), timeout=ANSWER_S)
            return {name: one.result() for name, one in answers.items() if one.done()}
        finally:
            for number in asked.values():
                del self._asked[number]

    def take(self, answer: m.Seen) -> None:
        """Take a replica's answer; one that nobody waits for any more is dropped."""
        asked = self._asked.get(answer.number)
        if asked is not None and not asked.done():
            asked.set_result(answer.activity)
