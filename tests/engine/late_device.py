"""A device that works behind the host: it runs what is queued only when results are asked for.

Its KV is a table of slots: each holds a token and all that it was computed behind. Its model is a hash
of the tokens that it finds there. So a token is right only if every slot that it depends on held the
right one when the pass ran, and `expected_tokens` tells what that is without any engine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf

from minserve.engine.batch import RunResult, Scheduled
from minserve.engine.speculation.proposal import SampledToken, Verified
from minserve.request import Request, Sequence

VOCAB, END = 5, 4
UNWRITTEN = -1
Slot = tuple[int, int]


def next_token(text: SequenceOf[int], seed: int) -> int:
    """What the model says behind a text; every tenth time or so that is the end."""
    rng = random.Random(f"{seed} {list(text)}")
    return END if rng.random() < 0.1 else rng.randrange(END)


def expected_tokens(request: Request, index: int) -> list[int]:
    """An output, made without an engine."""
    text, seed = list(request.prompt_token_ids), request.seed + index
    out: list[int] = []
    while len(out) < request.max_tokens and END not in out:
        out.append(next_token([*text, *out], seed))
    return out


class LateBatch:
    """A batch in the device's queue.

    Attributes:
        chosen: the token of each sequence that was sampled, once that has run.
    """

    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self._seqs: list[Sequence] = []
        self._found: dict[str, list[int]] = {}  # choices behind the newest token and each draft
        self._texts: dict[str, list[list[int]]] = {}
        self._drafted: dict[str, tuple[int, ...]] = {}
        self.chosen: dict[str, int] = {}

    def sample(self, batch: SequenceOf[Scheduled]) -> None:
        self._device.may_fail("sample")
        self._seqs = [item.seq for item in batch]
        for item in batch:
            # The host's own view, which is whole by now.
            assert isinstance(item.seq.token_ids, list)
        texts = {i.seq.seq_id: i.seq.token_ids[: i.end] for i in batch if i.samples}
        seeds = {i.seq.seq_id: i.seq.request.seed + i.seq.index for i in batch}
        self._device.queue.append((self, lambda: self._choose(texts, seeds)))

    def results(self) -> Mapping[str, RunResult]:
        self._device.run(self)
        self._device.may_fail("results")
        return {seq.seq_id: RunResult(self._verified(seq.seq_id)) for seq in self._seqs}

    def forward(self, parts: list[tuple[Scheduled, list[int], Callable[[], list[int]]]]) -> None:
        """Write the KV of each part, then read that of its whole text."""
        kv, size = self._device.kv, self._device.block_size
        for item, table, tokens in parts:
            text: tuple[int, ...] = ()
            if item.start:
                before = item.start - 1
                text = kv.get((table[before // size], before % size), (UNWRITTEN,))
            for position, token in enumerate(tokens(), item.start):
                block = table[position // size]
                assert block in item.seq.block_table, f"{item.seq} has lost block {block}"
                text = kv[block, position % size] = (*text, token)
        for item, table, tokens in parts:
            if not item.samples:
                continue
            end = item.start + len(tokens())
            text = [kv.get((table[p // size], p % size), (UNWRITTEN,))[-1] for p in range(end)]
            last = end - 1
            assert kv[table[last // size], last % size] == tuple(text), f"{item.seq} has other KV"
            num = len(item.drafted)
            self._texts[item.seq.seq_id] = [text[: end - num + i] for i in range(num + 1)]
            self._drafted[item.seq.seq_id] = item.drafted

    def _choose(self, texts: dict[str, list[int]], seeds: dict[str, int]) -> None:
        for seq_id, text in texts.items():
            rows = self._texts[seq_id]
            assert rows[0] == text, f"{seq_id} was computed from other tokens than its own"
            self._found[seq_id] = [next_token(row, seeds[seq_id]) for row in rows]
            self.chosen[seq_id] = self._found[seq_id][0]

    def _verified(self, seq_id: str) -> Verified | None:
        found = self._found.get(seq_id)
        if found is None:
            return None
        num, drafted = 0, self._drafted[seq_id]
        while num < len(drafted) and drafted[num] == found[num]:
            num += 1
        return Verified(tuple(SampledToken(token, None) for token in found[: num + 1]), num)


class LateDevice:
    """Runs batches in order, as late as can be.

    Args:
        fails: called with what is about to happen; whatever it raises happens.

    Attributes:
        num_followed: batches that were queued before the one before them had run.
    """

    device = "a late device"

    def __init__(self, block_size: int, fails: Callable[[str], None] = lambda _: None) -> None:
        self.block_size = block_size
        self.may_fail = fails
        self.kv: dict[Slot, tuple[int, ...]] = {}
        self.queue: list[tuple[LateBatch, Callable[[], None]]] = []
        self.num_followed = 0

    @property
    def is_lost(self) -> bool:
        """Asking waits for all that is queued, as on a GPU."""
        while self.queue:
            self.run(self.queue[0][0])
        return False

    def launch(self, batch: SequenceOf[Scheduled]) -> LateBatch:
        launched = self._launch(batch, None)
        launched.sample(batch)
        return launched

    def follow(self, batch: SequenceOf[Scheduled], before: LateBatch) -> LateBatch:
        self.num_followed += 1
        return self._launch(batch, before)

    def run(self, batch: LateBatch) -> None:
        """Do what is queued up to the end of a batch, and nothing behind it."""
        while any(one is batch for one, _ in self.queue):
            _, work = self.queue.pop(0)
            work()

    def _launch(self, batch: SequenceOf[Scheduled], before: LateBatch | None) -> LateBatch:
        self.may_fail("launch")
        launched = LateBatch(self)
        parts = [(item, list(item.seq.block_table), _tokens(item, before)) for item in batch]
        self.queue.append((launched, lambda: launched.forward(parts)))
        return launched


def _tokens(item: Scheduled, before: LateBatch | None) -> Callable[[], list[int]]:
    """What an item runs, to be asked when it runs: the newest token may be the device's own."""
    seq = item.seq
    if isinstance(seq.token_ids, list):
        known = [*seq.token_ids[item.start : item.end], *item.drafted]
        return lambda: known
    assert before is not None, "a token that nobody knows"
    assert (item.num_tokens, item.drafted) == (1, ())
    return lambda: [before.chosen[seq.seq_id]]
