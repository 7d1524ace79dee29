"""`edf`: requests are promised their SLO earliest deadline first, each if all still fit.

Those of more weight come before the others.

The later planner of SLOs-Serve's authors works like this. Nothing but the choice of the requests
that are admitted differs from `dp`.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from minserve.planner.admission.outlook import Outlook
from minserve.planner.admission.prefill_rates import PrefillRates
from minserve.planner.admission.timeline import Admission, Candidate, insert_greedily
from minserve.planner.policies.promising import PromisingPlanner


class EdfPlanner(PromisingPlanner):
    """The policy that admits by greedy insertion. An event simulation checks the whole set at each
    step.
    """

    name = "edf"

    def choose(
        self, candidates: SequenceOf[Candidate], outlook: Outlook, rates: PrefillRates
    ) -> Admission:
        return insert_greedily(candidates, outlook, rates)
