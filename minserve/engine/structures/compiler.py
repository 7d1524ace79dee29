"""`StructureCompiler` makes grammars of structures, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher

from minserve.engine.structures.deadline import within
from minserve.engine.structures.grammar import LIMITS, GrammarError, brief, to_grammar
from minserve.engine.structures.guide import CompiledGrammar, FreePart, Guide
from minserve.engine.structures.trie import TokenTrie
from minserve.engine.text.tokenizer import Tokenizer
from minserve.structure import Structure

# Grammars that are kept, for requests with the same structure.
MOST_KEPT = 64
# Seconds for one of them. A server checks before, with a shorter limit, so that none takes so long.
PATIENCE_S = 10.0
# What the library says of a grammar without a single text.
_NO_TEXT = "NoExtensionBias"


def compile_matcher(structure: Structure, trie: TokenTrie) -> LLMatcher:
    """Return the library's matcher of a structure.

    Raises:
        GrammarError: where it is no grammar, exceeds the limits, or holds not even one token.
    """
    matcher = LLMatcher(trie.llguidance, to_grammar(structure), log_level=0, limits=LIMITS)
    warnings = [] if matcher.is_error() else matcher.get_grammar_warnings()
    if warnings:
        # They say what is not held.
        raise GrammarError(f"cannot be held: {brief('; '.join(warnings))}")
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        error = matcher.get_error()
        if error.startswith(_NO_TEXT):
            raise GrammarError("allows no output at all")
        raise GrammarError(f"cannot be compiled: {brief(error)}")
    return matcher


class StructureCompiler:
    """Compiles the structures of an engine's requests, each once.

    The vocabulary is taken in at the first one, or by `warm_up`; it takes half a second for 150 000
    tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._trie: TokenTrie | None = None
        self._kept: OrderedDict[Structure, Future[CompiledGrammar]] = OrderedDict()

    def guide(self, structure: Structure) -> Guide:
        """Return the guide of a new output, which is ready when the structure is compiled."""
        with self._lock:
            compiled = self._kept.get(structure)
            if compiled is None:
                compiled = self._kept[structure] = self._submit(structure)
                if len(self._kept) > MOST_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(structure)
        return Guide(compiled)

    def warm_up(self) -> None:
        """Take in the vocabulary, in the background."""
        with self._lock:
            self._executor().submit(self._known_trie)

    def _executor(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="minserve-structures")
        return self._thread

    def _submit(self, structure: Structure) -> Future[CompiledGrammar]:
        return self._executor().submit(self._compile_in_time, structure)

    def _compile_in_time(self, structure: Structure) -> CompiledGrammar:
        trie = self._known_trie()
        try:
            return within(PATIENCE_S, time.monotonic, lambda: self._compile(structure, trie))
        except TimeoutError:
            raise GrammarError("takes too long to compile; make it simpler") from None

    def _compile(self, structure: Structure, trie: TokenTrie) -> CompiledGrammar:
        marker, opener = structure.begins_after, structure.opener
        opener_id = None if opener is None else self._tokenizer.mark_id(opener)
        if opener is not None and opener_id is None:
            marker = None
        free = None if marker is None else FreePart(marker, trie.tokens, opener_id)
        return CompiledGrammar(trie, compile_matcher(structure, trie), free)

    def _known_trie(self) -> TokenTrie:
        # Only the one thread comes here.
        if self._trie is None:
            self._trie = TokenTrie.of(self._tokenizer, self._vocab_size)
        return self._trie
