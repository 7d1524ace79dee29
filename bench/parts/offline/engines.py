"""An engine in its own process: loads a model, makes a first token, and is measured.

`offline.py` starts it with the interpreter of the engine's environment, so that only the class of
that engine needs its packages. It prints events, each as a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # The interpreter put this script's own folder first, but imports begin at `bench/`.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from parts.offline.measure import (
    BATCHES,
    OUTPUT,
    PREFILL,
    PROMPT,
    Driver,
    Prompt,
    measure,
    random_prompt,
)
from shared.peers import cores

MAX_MODEL_LEN = 2048


class Minserve:
    """minserve's blocking engine, without a prefix cache."""

    runs_mixed = True

    def __init__(self, args: argparse.Namespace) -> None:
        from importlib.metadata import version

        from minserve import Engine, SamplingParams

        self.version = version("minserve")
        settings = {} if args.quantization is None else {"quantization": args.quantization}
        self._engine = Engine(args.model, dtype=args.dtype, prefix_caching=False, **settings)
        self._params = SamplingParams

    def _greedy(self, tokens_out: int) -> Any:
        return self._params(temperature=0.0, max_tokens=tokens_out, ignore_eos=True)

    def generate(self, prompts: list[Prompt], tokens_out: int) -> None:
        self._engine.generate(prompts, self._greedy(tokens_out))

    def mixed(self, decodes: list[Prompt], prompts: list[Prompt]) -> float:
        # Each prompt's first token takes a step, in which the prompts before it decode. Prompts
        # that come earlier ask for so many tokens more, so that all of them end together.
        running = []
        for number, prompt in enumerate(decodes):
            ahead = len(decodes) - number
            running.append(self._engine.stream(prompt, self._greedy(len(prompts) + ahead)))
            next(running[-1])
        started = time.perf_counter()
        for prompt in prompts:
            for _ in self._engine.stream(prompt, self._greedy(1)):
                pass
        for stream in running:
            for _ in stream:
                pass
        return time.perf_counter() - started


class Vllm:
    """vLLM's blocking engine, without a prefix cache."""

    runs_mixed = True

    def __init__(self, args: argparse.Namespace) -> None:
        from vllm import LLM, SamplingParams, __version__

        self.version = __version__
        self._llm = LLM(
            model=args.model,
            dtype=args.dtype,
            max_model_len=MAX_MODEL_LEN,
            enable_prefix_caching=False,
            disable_log_stats=True,
            skip_tokenizer_init=True,
        )
        self._params = SamplingParams
        self._num_added = 0

    def _greedy(self, tokens_out: int) -> Any:
        return self._params(
            temperature=0.0, max_tokens=tokens_out, ignore_eos=True, detokenize=False
        )

    def generate(self, prompts: list[Prompt], tokens_out: int) -> None:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        self._llm.generate(inputs, self._greedy(tokens_out), use_tqdm=False)

    def _add(self, prompt: Prompt, tokens_out: int) -> str:
        self._num_added += 1
        name = f"mixed-{self._num_added}"
        self._llm.llm_engine.add_request(
            name, {"prompt_token_ids": prompt}, self._greedy(tokens_out)
        )
        return name

    def mixed(self, decodes: list[Prompt], prompts: list[Prompt]) -> float:
        engine = self._llm.llm_engine
        silent = {self._add(prompt, len(prompts) + 1) for prompt in decodes}
        while silent:
            silent -= {output.request_id for output in engine.step()}
        waiting = iter(prompts)
        started = time.perf_counter()
        # The engine runs in another process, which is a step ahead. With one prompt more at the
        # beginning, no prompt is left over at the end.
        for prompt in islice(waiting, 2):
            self._add(prompt, 1)
        while engine.has_unfinished_requests():
            if engine.step() and (prompt := next(waiting, None)) is not None:
                self._add(prompt, 1)
        return time.perf_counter() - started


class LlamaCpp:
    """llama.cpp's `llama_decode` on batches of sequences, with every core.

    Its own scheduling belongs to its server, which the Python package does not hold.
    """

    runs_mixed = False

    def __init__(self, args: argparse.Namespace) -> None:
        import llama_cpp
        import numpy

        self.version = llama_cpp.__version__
        self._cpp, self._numpy = llama_cpp, numpy
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            args.model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {args.model}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )
        self._batch = llama_cpp.llama_batch_init(PREFILL, 0, 1)
        # Each sequence gets an equal share of a context.
        self._contexts = {
            batch: self._new_context(batch, PREFILL + OUTPUT if batch == 1 else PROMPT + OUTPUT)
            for batch in BATCHES
        }

    def _new_context(self, num_seqs: int, tokens_each: int) -> Any:
        params = self._cpp.llama_context_default_params()
        params.n_ctx = num_seqs * tokens_each
        params.n_batch = PREFILL
        params.n_seq_max = num_seqs
        params.n_threads = params.n_threads_batch = len(cores())
        context = self._cpp.llama_init_from_model(self._model, params)
        if not context:
            raise SystemExit(f"llama.cpp has no memory for {num_seqs} sequences")
        return context

    def generate(self, prompts: list[Prompt], tokens_out: int) -> None:
        context = self._contexts[len(prompts)]
        memory = self._cpp.llama_get_memory(context)
        self._cpp.llama_memory_clear(memory, True)
        newest = self._prefill(context, prompts)
        for step in range(tokens_out - 1):
            places = [len(prompt) + step for prompt in prompts]
            entries = [(newest[i], place, i, True) for i, place in enumerate(places)]
            newest = self._run(context, entries)

    def _prefill(self, context: Any, prompts: list[Prompt]) -> list[int]:
        """Return the first token after each prompt; prompts run together while a batch has room."""
        newest, entries = [], []
        for number, prompt in enumerate(prompts):
            entries += [
                (token, place, number, place == len(prompt) - 1)
                for place, token in enumerate(prompt)
            ]
            if number == len(prompts) - 1 or len(entries) + len(prompt) > PREFILL:
                newest += self._run(context, entries)
                entries = []
        return newest

    def _run(self, context: Any, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run one forward pass, and return the next tokens that are wanted.

        Args:
            entries: token, position, sequence, and whether the next token is wanted.
        """
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, place, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if failed := self._cpp.llama_decode(context, batch):
            raise SystemExit(f"llama.cpp's llama_decode failed with {failed}")
        return [self._best(context, i) for i, entry in enumerate(entries) if entry[3]]

    def _best(self, context: Any, row: int) -> int:
        logits = self._cpp.llama_get_logits_ith(context, row)
        return int(self._numpy.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


DRIVERS = {"minserve": Minserve, "vllm": Vllm, "llama.cpp": LlamaCpp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=DRIVERS, required=True)
    parser.add_argument("--model", required=True, help="in the form that the engine reads")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", help="quantization of minserve's weights")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    driver: Driver = DRIVERS[args.engine](args)
    driver.generate([random_prompt(16)], 1)
    tell("first token", version=driver.version)
    tell("rates", rates=measure(driver, args.repeats, lambda: tell("repeat")))


def tell(event: str, **more: Any) -> None:
    """Print an event for the parent process."""
    print(json.dumps({"event": event, **more}), flush=True)


if __name__ == "__main__":
    main()
