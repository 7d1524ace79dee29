"""`Leader`: tells the other ranks of each step of a pass, so that they take it too."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from minserve.engine.device.batch_tensors import BatchLayout
from minserve.engine.ranks.group import RankGroup
from minserve.engine.ranks.keeper import Keeper
from minserve.engine.ranks.line import Line, Verb
from minserve.engine.ranks.shared_memory import PassRanks
from minserve.errors import RankLostError

# The dtypes of hidden states, by the numbers that stand for them in messages.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Leader:
    """Rank 0's side of the passes over a model: the `Company` of its `PagedModel`.

    It is a context of each step. What fails between the word to the other ranks and the end of the
    step leaves them somewhere else than this rank, so that the group is lost.

    Attributes:
        keeper: who keeps the other ranks.
    """

    def __init__(self, group: RankGroup, line: Line, keeper: Keeper) -> None:
        self._group, self._line, self.keeper = group, line, keeper
        self._is_told = False

    @property
    def size(self) -> int:
        """The number of ranks, this one included."""
        return self._group.size

    @property
    def ranks(self) -> PassRanks:
        """The collectives of its passes."""
        return self._group.ranks

    @property
    def is_lost(self) -> bool:
        return self.keeper.lost is not None

    def check(self) -> None:
        """Ask whether the other ranks are still there, which any pass needs that has just ended.

        Raises:
            RankLostError: if one of them is not.
        """
        self.keeper.check()

    def __enter__(self) -> None:
        self.check()
        self._is_told = False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or not self._is_told:
            return
        if isinstance(error, RankLostError):
            self.keeper.give_up(error)
            return
        if not isinstance(error, Exception):  # Ctrl-C
            self.keeper.give_up(RankLostError("a pass was interrupted", by_fault=False))
            return
        raise self.keeper.reason_of(error) from error

    def forward(
        self, layout: BatchLayout, num_decodes: int, lengths: list[int], inputs: Tensor
    ) -> None:
        """Have the others run a pass.

        Args:
            lengths: what the host knows of the batch: ``starts``, then ``lengths``.
            inputs: the packed inputs on the device, int64 ``[layout.size]``.
        """
        self._share(Verb.FORWARD, (*layout, num_decodes), inputs, lengths)

    def replay(self, number: int, inputs: Tensor) -> None:
        """Have the others replay the recorded pass of that number.

        Args:
            inputs: as the graph reads them, on the device.
        """
        self._share(Verb.REPLAY, (number,), inputs, [])

    def logits(self, hidden: Tensor) -> None:
        """Have the others compute their part of the logits of hidden states ``[rows, hidden]``."""
        self._is_told = True
        self._line.send(Verb.LOGITS, (*hidden.shape, DTYPES.index(hidden.dtype)))
        self._group.ranks.broadcast(hidden.contiguous())

    def _share(
        self, verb: Verb, numbers: tuple[int, ...], inputs: Tensor, lengths: list[int]
    ) -> None:
        self._is_told = True
        if inputs.device.type == "cpu":  # the lengths are among the inputs, on the host
            self._line.send(verb, numbers, inputs)
            return
        self._line.send(verb, numbers, torch.tensor(lengths, dtype=torch.int64))
        self._group.ranks.broadcast(inputs)
