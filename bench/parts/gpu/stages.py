"""The stages of `gpu.sh`, each with its time limit; a stage that fails does not stop the others.

It writes one JSON file with all figures and one log, both named after the device. The file is
written anew after every stage; a stage's own rows are in a file beside it as soon as they are
measured, and stay there where the stage is cut off. The last line is JSON; the exit status is 0 if
every stage passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[3]
# Import names of packages that the stages need, and of packages that they can do without.
NEEDED = (
    "torch", "triton", "numpy", "transformers", "tokenizers", "safetensors", "psutil", "tqdm",
    "tabulate", "jinja2", "pytest", "pytest_timeout",
)  # fmt: skip
OPTIONAL = ("flash_attn", "gguf", "matplotlib", "xdist")
GPU_TESTS = (
    "tests/minserve_kernels",
    "tests/models/test_fused_layers.py",
    "tests/engine/device/test_cuda_graphs.py",
    "tests/engine/device/test_launch.py",
    "tests/engine/test_triton_engine.py",
    "tests/engine/test_packed_engine.py",
)
TEST_WORKERS = 12
KILL_GRACE_S = 5.0
DRY_LIMIT_S = 300
RANKS_LIMIT_S = 120


@dataclass(frozen=True)
class Stage:
    """A command and its limit in seconds.

    Attributes:
        rows: the file of JSON lines that it writes beside its last line; ``None`` if it has none.
        needs: import names of packages without which the stage is left out.
    """

    name: str
    command: list[str]
    limit_s: float
    rows: Path | None = None
    needs: tuple[str, ...] = ()


def chosen(every: Sequence[Stage], names: str | None) -> list[Stage]:
    """Return the stages of those names, such as ``engine,kernels``, in that order; ``None``: all.

    Raises:
        ValueError: where there is no stage of a name, or a name is there twice.
    """
    if names is None:
        return list(every)
    known, wanted = {stage.name: stage for stage in every}, names.split(",")
    for name in wanted:
        if name not in known:
            raise ValueError(f"no stage {name!r}; there are {', '.join(known)}")
    if len({*wanted}) < len(wanted):
        raise ValueError(f"a stage is there twice in {names!r}")
    return [known[name] for name in wanted]


def tuning(dry: bool) -> list[Stage]:
    """Return the stage of ``--tune``, which tries other tiles: a second call, of 3 minutes."""
    seconds = ["--dry"] if dry else ["--quick", "--seconds", "150"]
    command = [sys.executable, "bench/kernel_bench.py", "--tune", *seconds]
    return [Stage("tune", command, DRY_LIMIT_S if dry else 175)]


def stages(dry: bool, rows: Path) -> list[Stage]:
    """Return the stages, the most important ones first.

    On a GPU all limits together leave a part of the 8 minutes for starting. On a CPU, which may be
    busy, they only end stages that hang.

    Args:
        rows: the beginning of the paths of files with rows.
    """
    python, dry_flag = sys.executable, ["--dry"] if dry else []
    kernel_rows, engine_rows = (
        rows.with_name(f"{rows.name}-{x}.jsonl") for x in ("kernels", "engine")
    )
    tests = ["tests/minserve_kernels/test_attention.py"] if dry else list(GPU_TESTS)
    if not dry and importlib.util.find_spec("xdist"):
        # Most of their time is compilation. A worker that has lost the device is replaced, but not
        # for ever.
        tests += ["-n", str(TEST_WORKERS), "--max-worker-restart", str(2 * TEST_WORKERS)]
    limits = (DRY_LIMIT_S,) * 6 if dry else (15, 110, 40, 80, 165, 55)
    seconds = [] if dry else ["--seconds", "65"]
    return [
        Stage("ceilings", [python, "bench/parts/gpu/ceilings.py", *dry_flag], limits[0]),
        Stage(
            "tests",
            [
                python, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark",
                "--disable-warnings", "-rfs", "--tb=short", "--durations=15", *tests,
            ],
            limits[1],
        ),
        Stage("parity", [python, "bench/parts/gpu/parity.py", *dry_flag], limits[2]),
        Stage(
            "kernels",
            [python, "bench/kernel_bench.py", *seconds, "--out", str(kernel_rows), *dry_flag],
            limits[3],
            kernel_rows,
        ),
        Stage(
            "engine",
            [
                python, "bench/engine_gpu.py", "--profile-seconds", "1" if dry else "9",
                "--out", str(engine_rows), *dry_flag,
            ],
            limits[4],
            engine_rows,
        ),
        Stage(
            "http",
            [python, "bench/parts/gpu/http_load.py", *dry_flag],
            limits[5],
            needs=("aiohttp", "msgspec", "prometheus_client"),
        ),
    ]  # fmt: skip


def ranks_stage(dry: bool) -> Stage:
    """Return the stage for two GPUs; with one alone it says so, in a few seconds."""
    command = [sys.executable, "bench/tensor_parallel.py"]
    command += ["--dry"] if dry else ["--shapes", "llama-3.1-8b", "--rounds", "1"]
    return Stage("ranks", command, DRY_LIMIT_S if dry else RANKS_LIMIT_S)


def all_stages(dry: bool, rows: Path) -> list[Stage]:
    """Return `stages`, and the stage for two GPUs."""
    return [*stages(dry, rows), ranks_stage(dry)]


def link_packages(folder: Path) -> None:
    """Make the checkout importable from a folder, with the layout of an installation."""
    package = folder / "minserve"
    package.mkdir()
    for path in (*(ROOT / "minserve").iterdir(), ROOT / "kernels", ROOT / "models"):
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)


def environment(folder: Path) -> dict[str, str]:
    """Return the stages' environment: imports from that folder, no network, unbuffered output."""
    paths = [str(folder), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # Without this the current folder would come first, where minserve has no kernels and
        # models.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
        # transformers' bars; ours are whole lines in a log, and few.
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Test workers share the cores, and the CPU's work beside a GPU's is small.
        "OMP_NUM_THREADS": "2",
    }


def run_stage(stage: Stage, env: dict[str, str], scratch: Path, log: IO[str]) -> dict[str, Any]:
    """Run one stage to its end or its limit. Its stdout is shown; all output goes to the log."""
    if lacking := missing(stage.needs):
        print(f"== {stage.name} left out: no {', '.join(lacking)} here", flush=True)
        return {"passed": True, "exit": f"left out without {', '.join(lacking)}", "seconds": 0.0}
    print(f"== {stage.name} (at most {stage.limit_s:.0f} s)", flush=True)
    # Results name no machine's folders.
    words = (Path(word).name if Path(word).is_absolute() else word for word in stage.command)
    log.write(f"== {stage.name}: {' '.join(words)}\n")
    log.flush()
    out, started = scratch / f"{stage.name}.out", time.monotonic()
    with out.open("w") as file:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=env, stdout=file, stderr=log, start_new_session=True
        )
        try:
            status: int | None = process.wait(stage.limit_s)
        except subprocess.TimeoutExpired:
            status = None
            stop(process)
    seconds = round(time.monotonic() - started, 1)
    text = out.read_text(errors="replace")
    log.write(text)
    print(text, end="", flush=True)
    result: dict[str, Any] = {
        "passed": status == 0,
        "exit": "time limit" if status is None else status,
        "seconds": seconds,
        "summary": last_line(text),
    }
    if stage.rows is not None and stage.rows.exists():
        result["rows"] = list(whole_rows(stage.rows.read_text()))
        stage.rows.unlink()
    words = "passed" if result["passed"] else f"FAILED ({result['exit']}); the log says more"
    print(f"== {stage.name} {words}, {seconds:.0f} s", flush=True)
    return result


def whole_rows(text: str) -> Iterator[Any]:
    """Yield the parsed lines of JSON that were written to their end."""
    for line in text.splitlines():
        with suppress(ValueError):
            yield json.loads(line)


def stop(process: subprocess.Popen) -> None:
    """End a stage and all processes that it started."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILL_GRACE_S)


def last_line(text: str) -> Any:
    """Return a stage's last line: parsed if it is JSON, else as text; ``None`` without output."""
    lines = text.strip().splitlines()
    if not lines:
        return None
    try:
        return json.loads(lines[-1])
    except ValueError:
        return lines[-1]


def machine(env: dict[str, str], what: str = "gpu_machine") -> dict[str, str]:
    """Return device and versions, or another function's result of `shared.machine`.

    Another process finds them, so that this one needs no GPU.
    """
    code = f"import json; from shared.machine import {what}; print(json.dumps({what}()))"
    words = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    ).stdout
    return json.loads(words.strip().splitlines()[-1])


def missing(names: tuple[str, ...]) -> list[str]:
    """Return the names that cannot be imported."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU, in the interpreter")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--tune", action="store_true", help="try other tiles for attention instead")
    what.add_argument("--stages", metavar="NAMES", help="run these alone, as in engine,kernels")
    args = parser.parse_args()
    try:  # before anything slow
        chosen(all_stages(args.dry, args.out), args.stages)
    except ValueError as error:
        parser.error(str(error))
    if lacking := missing(NEEDED):
        print(f"missing Python packages: {', '.join(lacking)}", file=sys.stderr)
        return 2
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        link_packages(scratch)
        env = environment(scratch)
        if args.dry:
            env["TRITON_INTERPRET"] = "1"  # without it, programs begin once more to set it
        words = machine(env)
        if words["device"] == "cpu" and not args.dry:
            print("no CUDA device here; try --dry", file=sys.stderr)
            return 2
        args.out.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", words["device"].lower()).strip("-")
        # What a part of the stages tells does not replace what all of them told.
        slug += "-tune" if args.tune else ""
        slug += f"-{args.stages.replace(',', '-')}" if args.stages else ""
        slug += "-dry" if args.dry else ""
        log_file, json_file = args.out / f"{slug}.log", args.out / f"{slug}.json"
        print(f"{words}; not installed: {', '.join(missing(OPTIONAL)) or 'nothing'}", flush=True)
        results: dict[str, dict[str, Any]] = {}
        with log_file.open("w", encoding="utf-8") as log:
            rows = args.out.resolve() / slug
            every = tuning(args.dry) if args.tune else all_stages(args.dry, rows)
            for stage in chosen(every, args.stages):
                if stage.rows is not None:
                    stage.rows.unlink(missing_ok=True)  # of a call that was cut off
                results[stage.name] = run_stage(stage, env, scratch, log)
                results[stage.name]["gpu_after"] = machine(env, "gpu_state")
                # Written after each stage, in case the machine is lost before the last one.
                report = {
                    **words,
                    "dry": args.dry,
                    "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
                    "seconds": round(time.monotonic() - started, 1),
                    "passed": all(result["passed"] for result in results.values()),
                    "stages": results,
                }
                json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    brief = {n: {k: v for k, v in r.items() if k != "rows"} for n, r in results.items()}
    print(json.dumps({**report, "stages": brief, "written": str(json_file)}))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
