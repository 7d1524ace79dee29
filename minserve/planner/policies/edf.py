"""`edf`: requests are promised their SLO earliest deadline first, each if all still fit.

The later planner of SLOs-Serve's authors works like this. It differs from `dp` in nothing but
who is admitted.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from minserve.planner.admission.outlook import Outlook
from minserve.planner.admission.prefill_rates import PrefillRates
from minserve.planner.admission.timeline import Admission, Candidate, insert_greedily
from minserve.planner.policies.promising import PromisingPlanner


class EdfPlanner(PromisingPlanner):
    """Admits by greedy insertion; each step is checked by an event simulation of the whole set."""

    name = "edf"

    def choose(
        self, candidates: SequenceOf[Candidate], outlook: Outlook, rates: PrefillRates
    ) -> Admission:
        return insert_greedily(candidates, outlook, rates)
