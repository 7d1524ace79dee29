"""Typed errors: one class per condition that a user can meet.

Every error says what is wrong and what to do about it. Nothing below the
server knows about HTTP; the server maps these classes to status codes.
"""

from __future__ import annotations


class MinserveError(Exception):
    """Base class of every error that minserve raises on purpose."""


class ConfigError(MinserveError):
    """A setting, or a combination of settings, that cannot work."""


class WorkloadError(MinserveError):
    """A scenario, trace or target of a load test that cannot be used; says which row or value."""


class SimulationError(MinserveError):
    """A simulation that cannot go on: a bug in a policy, or settings that leave it no move."""


class ModelLoadError(MinserveError):
    """A model folder or file that cannot be loaded; names the file and the tensor."""


class UnsupportedModelError(ModelLoadError):
    """An architecture, or a variant of one, that minserve does not implement."""


class BackendUnavailableError(MinserveError):
    """An attention backend that cannot run here, or not with this model."""


class OutOfBlocksError(MinserveError):
    """The block pool was asked for more blocks than are free.

    Planners never schedule past the free blocks, so this reaching a user is a bug.
    """


class PoolCorruptedError(MinserveError):
    """The block pool's books do not add up: a bug, found by its integrity check."""


class InvalidRequestError(MinserveError):
    """A request that can never be served as it stands.

    ``param`` names the offending field where one field is to blame.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestTooLongError(InvalidRequestError):
    """Prompt plus output exceed the model's length or the whole KV pool."""


class InvalidSLOError(InvalidRequestError):
    """A latency objective that is out of range, contradicts another, or names no class."""


class SLOUnattainableError(MinserveError):
    """The planner cannot keep this request's SLO, and the request asked to be refused then.

    Attributes:
        reason: a word for logs and headers, such as ``compute`` or ``memory``.
        retry_after_s: when, by the planner's prediction, the same request would be admitted;
            infinite where it never would.
    """

    def __init__(self, message: str, *, reason: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class QueueFullError(MinserveError):
    """The queue limit is reached; the request was not accepted."""


class DeviceLostError(MinserveError):
    """The device runs nothing any more; only a new process helps."""


class RankLostError(DeviceLostError):
    """One of the processes that run the model together has ended or hangs.

    Attributes:
        by_fault: True if it crashed, failed or hangs; False if somebody else ended it.
    """

    def __init__(self, message: str, *, by_fault: bool) -> None:
        super().__init__(message)
        self.by_fault = by_fault

    def again(self) -> RankLostError:
        """Return an equal error."""
        return RankLostError(str(self), by_fault=self.by_fault)


class ProfileError(MinserveError):
    """The device's speed could not be measured or fitted."""


class EngineStoppedError(MinserveError):
    """The engine is shutting down or has stopped; the request was not served."""


class RequestTimeoutError(MinserveError):
    """A request took longer than the server allows; what was generated so far is no whole output."""


class GenerationError(MinserveError):
    """Running this one request failed; other requests are not affected."""


class InvalidPlanError(GenerationError):
    """A plan contradicts itself or the engine's state about a request, which ends for it: a bug
    in a policy.
    """


class ProtocolError(MinserveError):
    """Something came over a control connection that is no message, or not one expected there."""


class ReplicaLostError(MinserveError):
    """A replica's process has ended, hangs, or cannot be reached any more."""


class ReplicaHungError(ReplicaLostError):
    """A replica has told of an iteration that takes longer than the watchdog allows."""


class ReplicaRefusedError(MinserveError):
    """A replica that differs from the others of its controller, and so is not taken in."""


class NoReplicaError(MinserveError):
    """No replica is up that could serve the request; they are started again by themselves."""
