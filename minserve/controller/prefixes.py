"""`PrefixMap`: remembers which replica likely holds the KV of a prompt's beginning.

It is a guess from the prompts that were sent to each replica: replicas evict blocks and do not
report it. A wrong guess costs a prefill, never a wrong answer, so plain hashes are enough.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf

CHUNK = 32
MOST_CHUNKS = 200_000
# One hash for each whole chunk of a prompt; each covers all tokens up to the chunk's end.
Chunks = tuple[int, ...]


class PrefixMap:
    """Remembers prefixes in chunks of `CHUNK` tokens, and forgets those noted longest ago first.

    Args:
        most: number of chunks that are remembered.
    """

    def __init__(self, most: int = MOST_CHUNKS) -> None:
        self._most = most
        self._holders: OrderedDict[int, set[int]] = OrderedDict()

    def note(self, replica: int, chunks: Chunks) -> None:
        """Note that a replica has computed these chunks."""
        for chunk in chunks:
            self._holders.setdefault(chunk, set()).add(replica)
            self._holders.move_to_end(chunk)
        while len(self._holders) > self._most:
            self._holders.popitem(last=False)

    def cached(self, chunks: Chunks, num_tokens: int) -> dict[int, int]:
        """Return the number of leading tokens that each replica likely holds; never the whole
        prompt.

        Args:
            num_tokens: of the prompt. A replica without a hit is missing in the result.
        """
        found: dict[int, int] = {}
        candidates: set[int] | None = None
        for number, chunk in enumerate(chunks[: (num_tokens - 1) // CHUNK], 1):
            holders = self._holders.get(chunk, set())
            candidates = holders if candidates is None else candidates & holders
            if not candidates:
                break
            found.update(dict.fromkeys(candidates, number * CHUNK))
        return found

    def forget(self, replica: int) -> None:
        """Forget all chunks of a replica, because it has lost its memory."""
        for chunk in [chunk for chunk, holders in self._holders.items() if replica in holders]:
            self._holders[chunk].discard(replica)
            if not self._holders[chunk]:
                del self._holders[chunk]


def chunks_of(token_ids: SequenceOf[int], salt: str) -> Chunks:
    """Return one hash for each whole chunk, which covers the salt and all tokens up to its end."""
    before, found = hash(salt), []
    for start in range(0, len(token_ids) - CHUNK + 1, CHUNK):
        before = hash((before, *token_ids[start : start + CHUNK]))
        found.append(before)
    return tuple(found)
