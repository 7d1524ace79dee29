"""What `reproduce.py` measures, and to which extent: scenarios, devices, policies, sizes."""

from __future__ import annotations

from dataclasses import dataclass

from minserve.planner.policies.registry import POLICIES, promising_policies
from shared.simulated.cases import Size

SMALL, MEDIUM, LARGE = "opt-6.7b-a100", "opt-13b-2xa100", "opt-30b-4xa100"
OPT_SCENARIOS = ("chatbot", "coding", "summarization", "mixed")
# The paper uses a distilled 1.5B model for reasoning, of which no coefficients are published.
OTHER_MODELS = (("tools", "toolllama-7b-a100"), ("reasoning", "qwen2.5-7b-a100"))
HEADLINE = (*((scenario, SMALL) for scenario in OPT_SCENARIOS), *OTHER_MODELS)
LARGER = tuple((scenario, device) for device in (MEDIUM, LARGE) for scenario in OPT_SCENARIOS)

PROMISES = tuple(promising_policies())
BASELINES = ("vllm", "sarathi", "fcfs", "distserve")
# Registered policies that promise nothing and are no published baseline.
OTHER_POLICIES = tuple(name for name in POLICIES if name not in (*PROMISES, *BASELINES))
# With one prompt in a batch, as the authors' simulator runs vLLM; the best baseline leaves it out.
WEAK = "one prompt a batch"
WITH, WITHOUT = "with speculation", "without speculation"
MOST_DRAFTED = 8
# The order is that of the search: lengths that are often best come first.
DRAFTED = (0, 3, 4, 2, 6)
# The devices whose models have a draft model, and their speeds beside the smallest one's.
SLOWER = {SMALL: 1.0, MEDIUM: 0.4, LARGE: 0.15}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The extent of the evaluation.

    Attributes:
        quick: only OPT-6.7B on one A100, with fewer requests, variants and repeats.
    """

    quick: bool = False

    @property
    def combinations(self) -> tuple[tuple[str, str], ...]:
        """The pairs of scenario and device of which the capacity is measured."""
        return HEADLINE[:4] if self.quick else (*HEADLINE, *LARGER)

    def size(self, scenario: str, device: str = SMALL) -> Size:
        """Return the size of a scenario's simulations.

        Windows are long compared with a request's life. Larger models, which are not part of the
        headline, are measured once at each rate.
        """
        if self.quick:
            return Size(requests=250, repeats=1, tolerance=0.1, coarse=150)
        if scenario == "tools":
            return Size(requests=2500, repeats=1, tolerance=0.05, coarse=1500)
        if scenario == "reasoning":
            return Size(requests=300, repeats=1, tolerance=0.05, coarse=150)
        if device in (MEDIUM, LARGE):
            return Size(requests=400, repeats=1, tolerance=0.05, coarse=200)
        return Size(requests=600, repeats=2, tolerance=0.05, coarse=300)

    def drafted(self, device: str, mode: str) -> tuple[int, ...]:
        """Return the fixed speculation lengths that baselines try."""
        if mode == WITHOUT or not drafts(device):
            return (0,)
        return (0, 3) if self.quick else DRAFTED

    def modes(self, device: str) -> tuple[str, ...]:
        """Return the modes: with and without speculation, if the device has a draft model."""
        return (WITH, WITHOUT) if drafts(device) else (WITHOUT,)


def drafts(device: str) -> bool:
    """Return True for models that have a draft model."""
    return device in SLOWER
