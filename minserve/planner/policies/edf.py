"""Greedy admission by deadline, each step checked by simulation.

The later planner of SLOs-Serve's authors: requests are inserted earliest deadline first, and
each stays if the event simulation of the whole set meets every deadline. Everything else is
as in `dp`, so that the two differ in nothing but who is admitted.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from minserve.planner.admission.outlook import Outlook
from minserve.planner.admission.prefill_rates import PrefillRates
from minserve.planner.admission.timeline import Admission, Candidate, insert_greedily
from minserve.planner.policies.dp import DpPlanner


class EdfPlanner(DpPlanner):
    """`DpPlanner` with greedy insertion in place of the dynamic program."""

    name = "edf"

    @staticmethod
    def choose(
        candidates: SequenceOf[Candidate], outlook: Outlook, rates: PrefillRates
    ) -> Admission:
        """Who of the candidates is served."""
        return insert_greedily(candidates, outlook, rates)
