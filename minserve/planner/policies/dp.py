"""`dp`: a dynamic program decides which requests are promised their SLO. The default policy."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from minserve.planner.admission.dynamic_program import admit
from minserve.planner.admission.outlook import Outlook
from minserve.planner.admission.prefill_rates import PrefillRates
from minserve.planner.admission.timeline import Admission, Candidate
from minserve.planner.policies.promising import PromisingPlanner


class DpPlanner(PromisingPlanner):
    """The policy that admits the most valuable set of requests that keeps every deadline.

    The set is that of `minserve.planner.admission.dynamic_program`, after SLOs-Serve (arXiv
    2504.08784).
    """

    name = "dp"

    def choose(
        self, candidates: SequenceOf[Candidate], outlook: Outlook, rates: PrefillRates
    ) -> Admission:
        return admit(candidates, outlook, rates)
