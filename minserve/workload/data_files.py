"""The data that ships with the package (sources and licences: ``data/README.md``)."""

from __future__ import annotations

import csv
import gzip
import json
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent / "data"


def data_path(kind: str, name: str) -> Path:
    """Return the path of a data set's file.

    Args:
        kind: ``arrivals``, ``lengths`` or ``prompts``.
    """
    suffix = "jsonl" if kind == "prompts" else "csv"
    return DATA / kind / f"{name}.{suffix}.gz"


def names(kind: str) -> list[str]:
    """Return the names of the data sets of a kind, sorted."""
    return sorted(file.name.split(".")[0] for file in (DATA / kind).glob("*.gz"))


@cache
def read_prompts(name: str) -> tuple[str, ...]:
    """Return the texts of a data set of prompts, in their order."""
    with gzip.open(data_path("prompts", name), "rt", encoding="utf-8") as lines:
        return tuple(json.loads(line)["prompt"] for line in lines)


def read_lengths(name: str) -> list[dict[str, str]]:
    """Return the rows of a data set of lengths, each as a dict by column."""
    with gzip.open(data_path("lengths", name), "rt", encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))
