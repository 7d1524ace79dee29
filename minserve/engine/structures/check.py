"""`StructureCheck`: whether a structure can be held, found out without the model's whole vocabulary."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import numpy as np
from llguidance import LLMatcher

from minserve.engine.structures.compiler import compile_matcher
from minserve.engine.structures.deadline import within
from minserve.engine.structures.grammar import GrammarError, brief, simplified
from minserve.engine.structures.trie import TokenTrie
from minserve.engine.text.tokenizer import Tokenizer
from minserve.structure import Structure, StructureKind

# Seconds of work that a structure may take here. The engine does the same work once more.
LONGEST_CHECK_S = 1.0
_PROBE_BYTES = 32
# JSON goes on with these wherever it branches out.
_LIKELY = b'{["'
# How a grammar names a token by its id.
_TOKEN_ID = re.compile(r"<\[(\d{1,9})\]>")


class StructureCheck:
    """Checks structures, in a process that has nothing else to do meanwhile.

    Attributes:
        is_stuck: true once a check was given up, which may go on for ever in a thread: the process
            should end.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._trie = TokenTrie.of_bytes(tokenizer)
        # The marks have other ids among the bytes.
        self._ids = {token_id: 256 + i for i, token_id in enumerate(sorted(tokenizer.mark_ids))}
        self.is_stuck = False

    def checked(self, structure: Structure) -> Structure:
        """Return a structure that can be held, in a form that is cheap to compile.

        Raises:
            InvalidRequestError: where it cannot be held, or that takes too long.
        """
        try:
            # The clock's seconds would say little of a process that seldom gets a core.
            return within(LONGEST_CHECK_S, time.process_time, lambda: self._checked(structure))
        except TimeoutError:
            self.is_stuck = True
            problem = "takes too long to compile; make it simpler"
        except GrammarError as error:
            problem = str(error)
        raise structure.refusal(problem)

    def _checked(self, structure: Structure) -> Structure:
        structure = simplified(structure)
        tried = structure
        if structure.kind is StructureKind.LARK:
            source = _TOKEN_ID.sub(self._with_own_id, structure.source)
            tried = replace(structure, source=source)
        _probe(compile_matcher(tried, self._trie))
        return structure

    def _with_own_id(self, found: re.Match[str]) -> str:
        own = self._ids.get(int(found[1]))
        return found[0] if own is None else f"<[{own}]>"


def _probe(matcher: LLMatcher) -> None:
    """Follow one of the texts for a while: some grammars exceed the limits only then.

    Raises:
        GrammarError: where it does.
    """
    for _ in range(_PROBE_BYTES):
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(mask[:256])
        if not len(allowed) or matcher.is_error():
            break
        likely = [i for i in _LIKELY if mask[i]]
        if not matcher.consume_token(int(likely[0] if likely else allowed[0])):
            break
    if matcher.is_error():
        raise GrammarError(f"is too complex: {brief(matcher.get_error())}")
