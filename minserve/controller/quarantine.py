"""`Quarantine`: finds the request that kills what it runs on, and ends no other one for it.

The rule:

1. A replica is lost *by a fault* if its process crashed, ended with an error, was ended by the
   system for want of memory, or told of an iteration that hangs. Any other loss (a signal from
   outside, silence, a broken connection, a process on another machine) accuses nobody.
2. Whatever ran on a replica that is lost by a fault is *suspect*.
3. A suspect goes on alone: on a replica that has said that it has nothing else, and that gets
   nothing else until the suspect is cleared. Such a replica is a *ward*.
4. A suspect is *cleared* once each of its outputs has brought `PROOF_TOKENS` tokens more or has
   ended. That another one is convicted does not clear it: both may kill, as copies of a request do.
5. A suspect whose ward is lost by a fault is *convicted*: it is ended with an error. So it costs
   two processes, and nothing else was running when the second one was lost.
6. Losses that accuse nobody are counted for each request until it brings a token. After
   `ISOLATING_LOSSES` in a row it goes on alone, as suspects do, and after `MOST_LOSSES` in a row
   it is ended: then it is likely that it kills in a way that cannot be told from outside.

A replica's new process has run the model before it joins, so a device that is broken is not taken
for a fault of the request that comes next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from minserve.controller.flights import Flight

# Tokens that an iteration may have made without the client's having them: what kills does so
# within so many tokens of what was delivered. Drafted tokens are the reason for more than a few.
PROOF_TOKENS = 16
ISOLATING_LOSSES = 3
MOST_LOSSES = 10
# Seconds that suspects wait for a replica that has nothing to do, such as the lost one's next
# process, before another replica gives its requests away for them.
WARD_S = 60.0


class Quarantine:
    """The suspects, and the replicas where they run alone.

    Attributes:
        wards: by the number of a replica, the suspect on it; ``None`` until the replica has said
            that it has nothing else.
    """

    def __init__(self) -> None:
        self.wards: dict[int, Flight | None] = {}
        # By request, how many tokens each output had delivered when it came under suspicion.
        self._suspects: dict[str, tuple[int, ...]] = {}
        self._waiting: dict[str, Flight] = {}
        self._since_s = 0.0

    def is_suspect(self, flight: Flight) -> bool:
        """Return whether a request may only run alone."""
        return flight.request.request_id in self._suspects

    @property
    def is_waiting(self) -> bool:
        """True while a suspect waits for a ward."""
        return bool(self._waiting)

    def judge(
        self, flights: Sequence[Flight], *, alone: Flight | None, fault: bool
    ) -> list[Flight]:
        """Note that a replica was lost, and return the requests that are convicted.

        After that, `is_suspect` says of each of the others how it may go on.

        Args:
            flights: what ran there, and still has a client.
            alone: the suspect whose ward it was.
            fault: whether the replica was lost by a fault.
        """
        convicted = []
        for flight in flights:
            flight.num_losses += 1
            if (fault and flight is alone) or flight.num_losses >= MOST_LOSSES:
                convicted.append(flight)
            elif fault or flight.num_losses >= ISOLATING_LOSSES:
                had = tuple(len(output.token_ids) for output in flight.outputs)
                self._suspects[flight.request.request_id] = had
        return convicted

    def wait(self, flight: Flight, now: float) -> None:
        """Let a suspect wait for a ward, in seconds of ``time.monotonic`` since now."""
        if not self._waiting:
            self._since_s = now
        self._waiting[flight.request.request_id] = flight

    def is_pressing(self, now: float) -> bool:
        """Return whether suspects have waited for so long that a replica has to be emptied."""
        return self.is_waiting and not self.wards and now - self._since_s > WARD_S

    def admit(self, number: int) -> Flight | None:
        """Return the suspect that a ward with nothing to do gets now, or ``None`` without any.

        What has not brought a token comes first, and of these the newest: what has run for long
        is the least likely cause.
        """
        if not self._waiting:
            return None
        flight = max(
            self._waiting.values(), key=lambda one: (not one.has_begun, one.request.arrival_s)
        )
        del self._waiting[flight.request.request_id]
        self.wards[number] = flight
        return flight

    def clear_if_proved(self, flight: Flight) -> None:
        """Suspect a request no more if it has brought enough tokens."""
        had = self._suspects.get(flight.request.request_id)
        if had is not None and _has_proved(flight, had):
            del self._suspects[flight.request.request_id]

    def forget(self, flight: Flight) -> None:
        """Forget a request that has ended. Its ward stays one until the replica says it is idle."""
        self._suspects.pop(flight.request.request_id, None)
        self._waiting.pop(flight.request.request_id, None)
        if flight.replica is not None and self.wards.get(flight.replica) is flight:
            self.wards[flight.replica] = None


def _has_proved(flight: Flight, had: Iterable[int]) -> bool:
    return all(
        output.ended or len(output.token_ids) >= num_tokens + PROOF_TOKENS
        for output, num_tokens in zip(flight.outputs, had, strict=True)
    )
