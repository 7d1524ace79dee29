"""Draws a profile: predicted against measured seconds. It needs the extra `plot`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from minserve.engine.profile.profile_cache import Profile

BAND = 0.1
TO_MS = 1e3


def can_plot() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def save_picture(profile: Profile, file: Path) -> None:
    """Draw held-out shapes by the fit that never saw them, all others by the final model.

    Raises:
        OSError, ValueError: where the file cannot be written or its suffix names no format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    unseen = {prediction.shape for prediction in profile.held_out}
    fitted = [s for s in profile.samples if s.shape not in unseen]
    figure, axes = pyplot.subplots(figsize=(6, 6))
    axes.scatter(
        [s.seconds * TO_MS for s in fitted],
        [profile.model.profiled(s.shape) * TO_MS for s in fitted],
        color="#b6bcc4",
        label="fitted shapes",
    )
    axes.scatter(
        [p.measured_s * TO_MS for p in profile.held_out],
        [p.predicted_s * TO_MS for p in profile.held_out],
        color="#1f6feb",
        label=f"held-out shapes, R2 {profile.quality.r2:.3f}",
    )
    ends = [f(s.seconds for s in profile.samples) * TO_MS for f in (min, max)]
    axes.plot(ends, ends, color="#7d8590", linewidth=1)
    low, high = ([end * (1 + sign * BAND) for end in ends] for sign in (-1, 1))
    axes.fill_between(ends, low, high, color="#7d8590", alpha=0.15, label=f"within {BAND:.0%}")
    axes.set(xscale="log", yscale="log", xlabel="measured ms", ylabel="predicted ms")
    axes.set_title(f"{profile.key.model.split(' (')[0]} on {profile.key.device}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
