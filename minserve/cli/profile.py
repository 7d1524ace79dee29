"""``minserve profile``: measures the device, checks the model's predictions, keeps the profile."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minserve.cli.flags import add_config_flags, given
from minserve.config import EngineConfig
from minserve.errors import ConfigError, ProfileError

if TYPE_CHECKING:
    from minserve.engine.profile.profile_cache import Prediction, Profile
    from minserve.planner.predict.perf_model import Piece

# With loading, a small model is done within a minute.
SECONDS = 45.0
# The lengths for which the zero-load figures are printed.
PREFILL_TOKENS = DECODE_CONTEXT = 512
NUM_ROWS = 8
# Longest wait for another process that measures the same device just now, in seconds.
PATIENCE_S = 10.0
# On an idle machine single iterations scatter by 10 to 30%.
BUSY_MARGIN = 1.5

_EXAMPLES = """\
examples:
  minserve profile
  minserve profile --model ./Llama-3.2-1B --plot fit.png
  minserve profile --seconds 10 --no-save --json

The profile is kept under ~/.cache/minserve/profiles (XDG_CACHE_HOME) for this model, device,
dtype and number of threads; the planner predicts with it. Measure on an idle machine.
"""
# Field of a piece, heading, and the factor from seconds to the milliseconds of the heading.
_COLUMNS = (
    ("tokens", "per token", 1e3),
    ("seqs", "per sequence", 1e3),
    ("context_tokens", "/1k context tokens", 1e6),
    ("attention_pairs", "/1M attention pairs", 1e9),
    ("draft_steps", "per draft step", 1e3),
    ("draft_tokens", "per draft token", 1e3),
    ("eager", "without a graph", 1e3),
    ("draft_eager", "draft without a graph", 1e3),
    ("base", "constant", 1e3),
)


def add_profile(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "profile",
        help="measure how fast this device runs a model",
        description="Measure how long batches of many shapes take, fit the performance model with "
        "which the planner predicts, and keep it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="X",
        help=f"longest time for measuring, in seconds (default: {SECONDS:g})",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="where to draw predicted against measured times; default: beside the kept profile, "
        "where matplotlib is installed",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no tables")
    parser.add_argument("--no-save", action="store_true", help="do not keep the profile")
    add_config_flags(parser, EngineConfig)
    parser.set_defaults(command=_profile, takes_model_flag=True)


def _profile(args: argparse.Namespace) -> int:
    """Load the model, measure the device, keep the profile, draw and print it."""
    if not 0 < args.seconds < float("inf"):
        raise ConfigError(f"seconds must be above 0, not {args.seconds:g}")
    config = EngineConfig.create(**given(args, EngineConfig))
    if config.executor == "simulated":
        raise ConfigError("a simulated device has its profile already; there is nothing to measure")

    from minserve.models.finding.source import find_model

    find_model(config.model)  # a model that is not to be had is told before torch is imported

    from minserve.engine.build import load_engine
    from minserve.engine.profile import profile_cache
    from minserve.engine.profile.profile_plot import can_plot, save_picture
    from minserve.engine.profile.profiler import profile_core
    from minserve.workload.plots import GET_MATPLOTLIB

    if args.plot is not None and not can_plot():
        raise ConfigError(f"--plot needs matplotlib; run in minserve's folder: {GET_MATPLOTLIB}")
    logging.getLogger().setLevel(logging.WARNING)
    loaded = load_engine(config)
    key = profile_cache.profile_key(loaded.core, loaded.source.name)
    with profile_cache.alone_with(key, PATIENCE_S):
        profile = profile_core(loaded.core, loaded.source.name, seconds=args.seconds, progress=True)
    saved, picture, problem = None, args.plot, None
    try:
        if not args.no_save:
            saved = profile_cache.save(profile)
            picture = picture or (saved.with_suffix(".png") if can_plot() else None)
        if picture is not None:
            save_picture(profile, picture)
    except (OSError, ValueError) as error:  # the measurement is worth printing nevertheless
        problem = error
    if args.json:
        print(json.dumps(_report(profile, saved, picture)))
    else:
        _print_tables(profile)
        print(f"kept in {saved}" if saved else "not kept")
        how = f"for a picture, run in minserve's folder: {GET_MATPLOTLIB}"
        print(f"picture in {picture}" if picture else how)
    if problem is not None:
        raise ProfileError(f"the profile could not be written: {problem}") from problem
    return 0


def _report(profile: Profile, saved: Path | None, picture: Path | None) -> dict[str, Any]:
    """Return all figures, for --json. Times are in seconds."""
    quality = asdict(profile.quality)
    if math.isnan(quality["r2"]):
        quality["r2"] = None  # JSON has no NaN
    num_held_out = quality.pop("num_samples")
    return {
        **asdict(profile.key),
        "torch": profile.torch,
        **quality,
        "num_shapes": len(profile.samples),
        "num_held_out": num_held_out,
        "seconds": profile.seconds,
        "pieces": [asdict(piece) for piece in profile.model.pieces],
        "margin": profile.model.margin,
        "zero_load_prefill_512_s": profile.model.zero_load_prefill_s(PREFILL_TOKENS),
        "zero_load_decode_s": profile.model.zero_load_decode_s(DECODE_CONTEXT),
        "profile": None if saved is None else str(saved),
        "plot": None if picture is None else str(picture),
    }


def _print_tables(profile: Profile) -> None:
    key, quality, model = profile.key, profile.quality, profile.model
    print(f"{key.model}\n{key.dtype} on {key.device}, {key.threads} threads, torch {profile.torch}")
    print("\nseconds of a batch = the largest of (ms)")
    _print_pieces(model.pieces)
    print(
        f"\nof {len(profile.samples)} batches, {quality.num_samples} were held out of the fit: "
        f"R2 {quality.r2:.4f}, mean error {quality.mape:.1%}, error p50 {quality.p50_error:.1%}, "
        f"p90 {quality.p90_error:.1%}, p99 {quality.p99_error:.1%}"
    )
    _print_rows(profile.held_out)
    print(
        f"\nzero load: prefill of {PREFILL_TOKENS} tokens "
        f"{model.zero_load_prefill_s(PREFILL_TOKENS) * 1e3:.1f} ms, decode step behind "
        f"{DECODE_CONTEXT} tokens {model.zero_load_decode_s(DECODE_CONTEXT) * 1e3:.1f} ms\n"
        f"measured in {profile.seconds:.1f} s; margin for noise {model.margin:.2f}"
    )
    if model.margin > BUSY_MARGIN:
        print("other work disturbed the measurement; profile again on an idle machine")


def _print_pieces(pieces: Sequence[Piece]) -> None:
    """Print one line per piece; features that no piece uses are left out."""
    from minserve.tables import text_table

    used = [column for column in _COLUMNS if any(getattr(piece, column[0]) for piece in pieces)]
    rows = [[f"{getattr(piece, name) * unit:.4g}" for name, _, unit in used] for piece in pieces]
    print(text_table([heading for _, heading, _ in used], rows, left=0))


def _print_rows(held_out: Sequence[Prediction]) -> None:
    """Print some held-out batches, from the shortest to the longest."""
    from minserve.tables import text_table

    rows = sorted(held_out, key=lambda prediction: prediction.measured_s)
    step = max(1, -(-len(rows) // NUM_ROWS))
    cells = [
        (
            row.shape.tokens,
            row.shape.seqs,
            row.shape.context_tokens,
            f"{row.measured_s * 1e3:.1f} ms",
            f"{row.predicted_s * 1e3:.1f} ms",
            f"{row.predicted_s / row.measured_s - 1:+.1%}",
        )
        for row in rows[::step]
    ]
    headings = ("tokens", "seqs", "context", "measured", "predicted", "error")
    print(text_table(headings, cells, left=0))
