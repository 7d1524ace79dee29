"""`DeviceTime`: how a simulated device's iterations differ from the time they should take.

::

        seconds = usual seconds x noise (of each iteration) x speed (of a period) + stalls

Speeds and stalls lie on the device's own time line and do not depend on the batches, so that all
policies meet the same ones. Noise is drawn for one iteration after the other.
"""

from __future__ import annotations

import math
import random

# Both are uniform in a range: the seconds that a device's speed holds, and a stall's seconds.
STEP_S = (10.0, 60.0)
STALL_S = (0.1, 1.0)


class DeviceTime:
    """The behaviour of one device over time. Its methods are called in the order of time.

    Args:
        noise: log-standard deviation of the iterations' times.
        speed_steps: factors on times are log-uniform between 1/speed_steps and speed_steps, with a
            new factor every `STEP_S` seconds. 1 keeps the speed.
        stall_every_s: mean seconds from the end of a stall to the next stall; ``None`` for no
            stalls. During a stall, which takes `STALL_S` seconds, the running batch stands still.
        seed: seed of all draws.
    """

    def __init__(
        self,
        *,
        noise: float = 0.0,
        speed_steps: float = 1.0,
        stall_every_s: float | None = None,
        seed: str = "",
    ) -> None:
        self._noise, self._log_steps = noise, math.log(speed_steps)
        self._stall_every_s = stall_every_s
        self._noises = random.Random(f"noise {seed}")
        self._steps = random.Random(f"steps {seed}")
        self._stalls = random.Random(f"stalls {seed}")
        self._noise_factor: float | None = None
        self._speed_factor, self._speed_until = 1.0, 0.0
        self._stall_from = self._stall_until = 0.0

    def factor(self, now: float) -> float:
        """Return the factor on the usual time of an iteration that begins now, without stalls.

        It stays the same until an iteration has run.
        """
        if self._noise_factor is None:
            # Nothing is drawn without noise, so the factor is exactly 1.
            drawn = self._noises.gauss(0.0, self._noise) if self._noise else 0.0
            self._noise_factor = math.exp(drawn)
        return self._noise_factor * self._speed(now)

    def seconds(self, usual_s: float, now: float) -> float:
        """Return the seconds of an iteration that begins now, stalls included.

        Args:
            usual_s: seconds that it should take.
        """
        seconds = usual_s * self.factor(now)
        self._noise_factor = None
        return seconds + self._stalled(now, seconds)

    def _speed(self, now: float) -> float:
        if self._log_steps:
            while self._speed_until <= now:
                self._speed_until += self._steps.uniform(*STEP_S)
                drawn = self._steps.uniform(-self._log_steps, self._log_steps)
                self._speed_factor = math.exp(drawn)
        return self._speed_factor

    def _stalled(self, now: float, seconds: float) -> float:
        """Return the seconds for which an iteration stands still."""
        if self._stall_every_s is None:
            return 0.0
        while self._stall_until <= now:
            self._next_stall()
        stalled = 0.0
        while self._stall_from < now + seconds + stalled:
            stalled += self._stall_until - max(self._stall_from, now)
            self._next_stall()
        return stalled

    def _next_stall(self) -> None:
        assert self._stall_every_s is not None, "asked only where there are stalls"
        gap = self._stalls.expovariate(1 / self._stall_every_s)
        self._stall_from = self._stall_until + gap
        self._stall_until = self._stall_from + self._stalls.uniform(*STALL_S)
