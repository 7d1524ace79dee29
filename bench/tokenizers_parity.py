"""Compare every form of vocabulary with the library that the form belongs to.

Vocabularies are trained on the spot and written as models' files are: folders with tokenizer.json,
tokenizer.model or vocab.json and merges.txt, and GGUF files; SmolLM2's is real. Each is read by
minserve, and its tokens and texts, streamed ones included, are compared on texts of all kinds.
Takes a minute and a half at most. The last line is JSON.

    .venv/bin/python bench/tokenizers_parity.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from minserve.engine.text.tokenizer import Tokenizer
from minserve.models.finding.source import find_model
from minserve.progress_bar import progress_bar
from parts.tokenizers_parity.cases import make_cases
from parts.tokenizers_parity.comparing import mismatches
from parts.tokenizers_parity.vocabularies import texts
from shared.program import positive, run_program

SHOWN = 10


def main() -> int:
    """Return 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=positive, default=5000, help="texts for each vocabulary")
    parser.add_argument("--seed", type=int, default=0, help="seed of the texts")
    args = parser.parse_args()
    chosen = texts(args.texts, args.seed)
    found: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        cases = make_cases(Path(folder))
        with progress_bar(total=len(cases) * len(chosen), unit="text", unit_scale=True) as bar:
            for case in cases:
                bar.set_description(case.name)
                tokenizer = Tokenizer.load(find_model(str(case.path)))
                for text in chosen:
                    found += mismatches(case, tokenizer, text)
                    bar.update()
    for line in found[:SHOWN]:
        print(line)
    counts = {"texts": len(chosen), "vocabularies": len(cases), "mismatches": len(found)}
    print(json.dumps(counts))
    return 1 if found else 0


if __name__ == "__main__":
    run_program(main)
