"""`Guide`: which tokens the structure of one output allows next.

Its state is a function of the output's tokens alone: it follows drafted tokens and comes back, and
one that is made anew for an output that goes on elsewhere is told the tokens so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from concurrent import futures
from typing import TYPE_CHECKING, Any

import numpy as np

from minserve.engine.structures.grammar import brief
from minserve.errors import InvalidRequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from minserve.engine.structures.trie import TokenTrie
    from minserve.request import Sequence

# Seconds of this thread that an output's structure may take: at once, and for each token besides.
# Nearly all take less than 0.1 ms for a token; the others share their thread with them.
START_S, TOKEN_S = 0.2, 0.002


class CompiledGrammar:
    """A grammar over a model's tokens, from which the guides of outputs are made.

    Args:
        matcher: the library's own, at the beginning of an output.
        free: the part before the structure, if there is one.
    """

    def __init__(self, trie: TokenTrie, matcher: Any, free: FreePart | None) -> None:
        self.trie, self.matcher, self.free = trie, matcher, free


class FreePart:
    """The part of outputs before their structure: it ends with the token that completes a marker.

    What follows the marker in that token is blank: tokens that bring more are not allowed there.

    Attributes:
        opener_id: the first token of outputs that have this part; ``None`` where all have it.
    """

    def __init__(
        self, marker: str, tokens: SequenceOf[bytes], opener_id: int | None = None
    ) -> None:
        self.opener_id = opener_id
        self._marker = marker.encode()
        self._tokens = tokens
        self._overshoots = _overshoots(self._marker, tokens)

    def follow(self, tail: bytes, token_id: int) -> bytes | None:
        """Return the tail behind one more token; ``None`` where the marker is complete.

        Args:
            tail: the newest bytes, as many as a beginning of the marker may have; none at first.
        """
        text = tail + self._tokens[token_id]
        if self._marker in text:
            return None
        keep = len(self._marker) - 1
        return text[-keep:] if keep else b""

    def forbidden(self, tail: bytes) -> Iterable[int]:
        """Return the tokens that would complete the marker and go on in the structure."""
        for size, ids in self._overshoots.items():
            if tail.endswith(self._marker[:size]):
                yield from ids


def _overshoots(marker: bytes, tokens: SequenceOf[bytes]) -> dict[int, list[int]]:
    """Return, by the number of the marker's bytes before it, the tokens that go on behind it."""
    found: dict[int, list[int]] = {}
    last = marker[-1:]
    for i, token in enumerate(tokens):
        if last not in token:
            continue
        for size in range(len(marker)):
            rest = marker[size:]
            at = token.find(rest) if size == 0 else 0 if token.startswith(rest) else -1
            if at >= 0 and token[at + len(rest) :].strip():
                found.setdefault(size, []).append(i)
    return found


class Guide:
    """Follows one output through its structure.

    It is used by one thread at a time, and knows the output's own tokens by `advance`.

    Attributes:
        error: what went wrong with it, which ends the output; ``None`` as long as nothing did.
    """

    def __init__(self, compiled: futures.Future[CompiledGrammar]) -> None:
        self._compiled = compiled
        self._grammar: CompiledGrammar | None = None
        self._matcher: Any = None
        self._tokens: list[int] = []
        # How many of them belong to the free part, and how many the matcher has taken of the others.
        self._num_free = self._num_taken = 0
        # Drafted tokens that it has taken behind these.
        self._ahead: list[int] = []
        # The newest bytes of the free part; ``None`` outside of it.
        self._tail: bytes | None = None
        self._may_open, self._opener_id = False, -1
        self._spent_s, self._num_steps = 0.0, 0
        self.error: str | None = None

    @property
    def is_ready(self) -> bool:
        """True once its grammar is compiled, or has failed."""
        return self._compiled.done()

    def wait(self, seconds: float) -> None:
        """Wait until it is ready, for so many seconds at most."""
        futures.wait([self._compiled], seconds)

    @property
    def vocab_size(self) -> int:
        """The number of tokens that it knows; 0 until it is started."""
        return 0 if self._grammar is None else self._grammar.trie.size - 1

    @property
    def can_end(self) -> bool:
        """True where what the output has is whole."""
        return self._timed(self._stand)[0]

    @property
    def is_over(self) -> bool:
        """True where the output is whole and nothing may follow."""
        return self._timed(self._stand)[1]

    def advance(self, token_id: int) -> tuple[bool, bool]:
        """Take the output's next token; its end is none.

        Returns:
            `can_end` and `is_over` behind it.
        """
        self._tokens.append(token_id)
        return self._timed(self._stand)

    def start(self) -> None:
        """Take the grammar once it is ready.

        Raises:
            GrammarError: if it could not be compiled.
        """
        grammar = self._compiled.result()
        self._grammar = grammar
        self._matcher = grammar.matcher.deep_copy()
        if grammar.free is not None:
            opener = grammar.free.opener_id
            if opener is None:
                self._tail = b""
            else:
                self._may_open, self._opener_id = True, opener

    def fill(
        self, drafted: SequenceOf[int], mask: NDArray[np.uint8], ends: Iterable[int], may_end: bool
    ) -> None:
        """Write which tokens may follow the output and some drafted tokens.

        Args:
            mask: one bit for each id, lowest first, of at least the vocabulary's size.
            ends: the tokens that end the output. They are allowed where the output is whole.
            may_end: false where the output should go on: then they are allowed only where nothing
                else is.
        """
        mask[:] = 0
        if self._grammar is None or self.error is not None:
            return
        self._timed(lambda: self._fill(drafted, mask, ends, may_end))
        if self.error is not None:
            mask[:] = 0

    def _fill(
        self, drafted: SequenceOf[int], mask: NDArray[np.uint8], ends: Iterable[int], may_end: bool
    ) -> None:
        grammar = self._grammar
        assert grammar is not None
        self._num_steps += 1
        is_first = not self._tokens and not drafted
        tail, drafted = self._behind_marker(drafted)
        if tail is not None:
            assert grammar.free is not None
            whole = self.vocab_size // 8
            mask[:whole] = 0xFF
            _set(mask, range(8 * whole, self.vocab_size))
            _clear(mask, [*ends, *grammar.free.forbidden(tail)])
            return
        if not self._take(drafted):
            return
        matcher = self._matcher
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, _words(grammar.trie.size) * 4)
        if matcher.is_error():
            self._fail(matcher.get_error())
            return
        _clear(mask, [grammar.trie.eos_id])
        if self._may_open and is_first:
            _set(mask, [self._opener_id])
        if matcher.is_accepting() and (may_end or not mask.any()):
            _set(mask, ends)

    def _behind_marker(self, drafted: SequenceOf[int]) -> tuple[bytes | None, SequenceOf[int]]:
        """Return the tail of the free part, ``None`` behind it, and the drafts of the structure."""
        self._read_free()
        tail = self._tail
        if self._may_open and not self._tokens and drafted and drafted[0] == self._opener_id:
            tail, drafted = b"", drafted[1:]
        if tail is None:
            return None, drafted
        assert self._grammar is not None
        assert self._grammar.free is not None
        for place, token in enumerate(drafted):
            tail = self._grammar.free.follow(tail, token)
            if tail is None:
                return None, drafted[place + 1 :]
        return tail, ()

    def _read_free(self) -> None:
        """Take the output's own tokens as long as they are free."""
        if self._may_open and self._tokens:
            self._may_open = False
            if self._tokens[0] == self._opener_id:
                self._tail, self._num_free = b"", 1
        while self._tail is not None and self._num_free < len(self._tokens):
            assert self._grammar is not None
            assert self._grammar.free is not None
            self._tail = self._grammar.free.follow(self._tail, self._tokens[self._num_free])
            self._num_free += 1

    def _stand(self) -> tuple[bool, bool]:
        """Bring the matcher to the output's end; return whether it may end there, and must."""
        if self._grammar is None or self.error is not None:
            return False, False
        self._read_free()
        if self._tail is not None:
            return False, False
        if not self._take(()):
            self._fail(self._matcher.get_error() or "a token that it does not allow was chosen")
            return False, False
        can_end = self._matcher.is_accepting()
        return can_end, can_end and self._matcher.is_stopped()

    def _take(self, drafted: SequenceOf[int]) -> bool:
        """Bring the matcher behind the output and drafted tokens; return whether it allows them."""
        own = self._tokens[self._num_free + self._num_taken :]
        wanted = [*own, *drafted]
        same = 0
        while same < min(len(self._ahead), len(wanted)) and self._ahead[same] == wanted[same]:
            same += 1
        if same < len(self._ahead):
            self._matcher.rollback(len(self._ahead) - same)
        more = wanted[same:]
        num = same + (self._matcher.try_consume_tokens(more) if more else 0)
        self._num_taken += min(num, len(own))
        self._ahead = wanted[len(own) : num]
        if self._matcher.is_error():
            self._fail(self._matcher.get_error())
        return num == len(wanted)

    def _timed(self, step: Callable[[], Any]) -> Any:
        """Do a step, and count its time against what the structure may take."""
        began = time.thread_time()
        try:
            return step()
        finally:
            self._spent_s += time.thread_time() - began
            if self._spent_s > START_S + TOKEN_S * self._num_steps:
                self._fail("it takes too long to tell which tokens may come next; make it simpler")

    def _fail(self, error: str) -> None:
        if self.error is None:
            self.error = f"the output's structure cannot be held: {brief(error)}"


def unheld(seq: Sequence) -> InvalidRequestError | None:
    """Return the error of an output whose structure cannot be held any more, else ``None``."""
    structure = seq.request.params.structure
    if seq.guide is None or seq.guide.error is None or structure is None:
        return None
    return InvalidRequestError(seq.guide.error, structure.param)


def _words(size: int) -> int:
    return -(-size // 32)


def mask_bytes(vocab_size: int) -> int:
    """Return the bytes of a mask for a trie of a vocabulary, its own end included."""
    return _words(vocab_size + 1) * 4


def _set(mask: NDArray[np.uint8], ids: Iterable[int]) -> None:
    for i in ids:
        mask[i >> 3] |= 1 << (i & 7)


def _clear(mask: NDArray[np.uint8], ids: Iterable[int]) -> None:
    for i in ids:
        mask[i >> 3] &= ~(1 << (i & 7)) & 0xFF
