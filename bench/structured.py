"""Measures structured output: whether all outputs keep their schemas, and what masks cost.

Schemas are those of OpenAI's Python client: the types of its answers and parameters, as its own
library pydantic writes them, with limits to the lengths of strings and lists so that outputs end.
Outputs are sampled, and checked by the library jsonschema. Then the same number of tokens is sampled
with a structure and without, in alternating turns. The last line is JSON: ``schemas``, ``refused``:
schemas that cannot be held, ``outputs``, ``cut``: those that were cut by their length, ``valid``: the
share of the others that keep their schema, and for each batch size the time of a token in
milliseconds without a structure, what masks add to it as a share (``overhead_b1``, ``overhead_b16``),
and the shares of all pairs of turns.

    .venv/bin/python bench/structured.py --json bench/results/structured.json   # three minutes
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import openai.types
import pydantic

from minserve import Engine, SamplingParams
from minserve.errors import InvalidRequestError
from minserve.progress_bar import progress_bar
from minserve.structure import Structure
from shared.machine import machine
from shared.program import positive, run_program

# Names of properties say little to a small model without them.
PROMPT = "Write an example of {title} as JSON:\n"
MAX_TOKENS = 1500
# Something long and ordinary, of which no output comes to an end.
ENDLESS = Structure.of_schema(
    {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 40},
                "kind": {"enum": ["first", "second", "third"]},
                "size": {"type": "number"},
                "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}},
            },
            "required": ["name", "kind", "size", "tags"],
            "additionalProperties": False,
        },
        "minItems": 10_000,
    }
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--schemas", type=positive, default=96)
    parser.add_argument("--batch", type=positive, default=16)
    parser.add_argument("--tokens", type=positive, default=48, help="of an output in a timed turn")
    parser.add_argument("--pairs", type=positive, default=9, help="of timed turns, for each batch")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    return parser.parse_args(argv)


def all_schemas() -> Iterator[dict[str, Any]]:
    """Yield the JSON schemas of all types of the client, each once, in the order of their names."""
    seen = set()
    for found in pkgutil.walk_packages(openai.types.__path__, "openai.types."):
        for name, value in sorted(vars(import_module(found.name)).items()):
            if not (isinstance(value, type) and issubclass(value, pydantic.BaseModel)):
                continue
            if value.__module__ != found.name or value in seen:
                continue
            seen.add(value)
            try:
                schema = value.model_json_schema()
            except pydantic.errors.PydanticInvalidForJsonSchema:
                continue
            if schema.get("properties"):
                yield {"title": name, **schema}


def chosen_schemas(num: int) -> list[dict[str, Any]]:
    """Return so many of them, taken at equal distances."""
    every = list(all_schemas())
    step = max(1.0, len(every) / num)
    return [bounded(every[int(i * step)]) for i in range(min(num, len(every)))]


def bounded(schema: Any) -> Any:
    """Return a schema of short strings and lists, with no more properties than it names."""
    if isinstance(schema, list):
        return [bounded(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    limits: dict[str, Any] = {}
    match schema.get("type"):
        case "string" if "enum" not in schema and "const" not in schema:
            limits = {"maxLength": 24}
        case "array":
            limits = {"maxItems": 2}
        case "object" if "properties" in schema:
            limits = {"additionalProperties": False}
    return {
        **{
            name: {key: bounded(one) for key, one in value.items()}
            if name in ("properties", "$defs")
            else bounded(value)
            for name, value in schema.items()
            if name not in ("default", "examples")
        },
        **limits,
    }


def is_valid(text: str, schema: Mapping[str, Any]) -> bool:
    """Return whether an output keeps its schema."""
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        print(f"{schema['title']}: {str(error)[:200]}\n  {text[:300]}")
        return False
    return True


def validity(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """Generate an output for each schema, and check them."""
    cases, refused = [], []
    for number, schema in enumerate(chosen_schemas(args.schemas)):
        try:
            structure = engine.prompts.structure_check().checked(Structure.of_schema(schema))
        except InvalidRequestError as error:
            refused.append(f"{schema['title']}: {error}")
            continue
        cases.append(
            (schema, SamplingParams(seed=number, max_tokens=MAX_TOKENS, structure=structure))
        )
    ended = cut = valid = 0
    for start in progress_bar(range(0, len(cases), args.batch), desc="outputs"):
        some = cases[start : start + args.batch]
        prompts = [PROMPT.format(title=schema["title"]) for schema, _ in some]
        results = engine.generate(prompts, [params for _, params in some])
        for (schema, _), result in zip(some, results, strict=True):
            output = result.outputs[0]
            if output.finish_reason == "length":
                cut += 1
                continue
            ended += 1
            valid += is_valid(output.text, schema)
    return {
        "schemas": len(cases) + len(refused),
        "refused": refused,
        "outputs": len(cases),
        "cut": cut,
        "valid": valid / ended if ended else None,
    }


def turn_s(engine: Engine, num: int, tokens: int, structure: Structure | None) -> float:
    """Return the seconds of a step that samples a token of so many outputs."""
    params = SamplingParams(seed=1, max_tokens=tokens, ignore_eos=True, structure=structure)
    started = time.perf_counter()
    engine.generate([f"{i}. A list of things as JSON:\n" for i in range(num)], params)
    return (time.perf_counter() - started) / tokens


def overhead(engine: Engine, num: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return what masks add to a step with so many outputs."""
    for structure in (None, ENDLESS):  # the grammar is compiled then, and prompts are cached
        turn_s(engine, num, args.tokens, structure)
    plain, shares = [], []
    for pair in progress_bar(range(args.pairs), desc=f"{num} outputs"):
        order = (None, ENDLESS) if pair % 2 else (ENDLESS, None)
        seconds = {one: turn_s(engine, num, args.tokens, one) for one in order}
        plain.append(seconds[None])
        shares.append(seconds[ENDLESS] / seconds[None] - 1)
    return {
        f"step_ms_b{num}": round(1000 * statistics.median(plain), 3),
        f"overhead_b{num}": round(statistics.median(shares), 4),
        f"shares_b{num}": [round(one, 4) for one in shares],
    }


def main() -> None:
    args = parse_args()
    engine = Engine(args.model, **({"threads": args.threads} if args.threads else {}))
    found = validity(engine, args)
    for num in (1, 16):
        found |= overhead(engine, num, args)
    found["machine"] = machine()
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    run_program(main)
