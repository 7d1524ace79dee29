"""`Ranks`: the group of processes that run a model together, and how its weights are divided.

Tensor parallelism as in Megatron-LM (Shoeybi et al., 2019): each rank has some of the attention
heads, some of the MLP's channels and some of the vocabulary. A linear whose outputs are divided
needs nothing from the others; after one whose inputs are divided the ranks' outputs are added up.
So a layer costs two sums over the group, and a pass one more for the embeddings and one gathering
of logits on rank 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import AllreduceOptions, GatherOptions

from minserve.errors import ConfigError
from minserve.models.tensor_part import TensorPart

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from minserve.models.config import ModelConfig
    from minserve.models.layers import Linear

# Two numbers have the same sum in either order.
_COMMUTES = 2


class Ranks:
    """A process's place in the group that runs a model; by default it is alone.

    All ranks make the same calls in the same order, each with tensors of the same shape and dtype.

    Attributes:
        rank: the number of this process in the group, from 0.
        size: the number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all ranks, and return it."""
        return tensor

    def gather(self, columns: Tensor) -> Tensor:
        """Return all ranks' columns side by side, ``[rows, size * n]`` of ``[rows, n]``, on rank 0.

        The other ranks get their own columns back.
        """
        return columns

    def summed(self, linear: Linear) -> Linear:
        """Return a linear whose inputs are divided among the ranks, with the sum of its outputs."""
        if self.size == 1:
            return linear
        return lambda x: self.all_reduce(linear(x))

    def gathered(self, linear: Linear, outputs: int) -> Linear:
        """Return a linear whose outputs are divided among the ranks, with all outputs on rank 0.

        Args:
            outputs: of all ranks; those beyond are padding.
        """
        if self.size == 1:
            return linear
        return lambda x: self.gather(linear(x))[:, :outputs].contiguous()

    def part(self, dim: int, count: int, width: int = 1) -> TensorPart:
        """Return this rank's part of a dimension of ``count`` things of ``width`` rows or columns.

        Where ``count`` does not divide, the last ranks have one more: rank 0 has other work too.
        """
        start, end = (rank * count // self.size for rank in (self.rank, self.rank + 1))
        return TensorPart(dim, ((start * width, (end - start) * width),))

    def queries(self, dim: int, heads: int, kv_heads: int, width: int) -> TensorPart:
        """Return this rank's part of the query heads.

        Where they do not divide, a rank has whole KV heads with all their query heads.
        """
        if heads % self.size == 0:
            return self.part(dim, heads, width)
        return self.part(dim, kv_heads, heads // kv_heads * width)

    def vocabulary(self, count: int) -> TensorPart:
        """Return this rank's rows of a vocabulary; the last ranks may have fewer, or none."""
        length = math.ceil(count / self.size)
        start = min(self.rank * length, count)
        return TensorPart(0, ((start, min(length, count - start)),))

    def padded(self, rows: Tensor, count: int) -> Tensor:
        """Return a rank's rows of a vocabulary with zeros for those that other ranks have more."""
        missing = math.ceil(count / self.size) - len(rows)
        return F.pad(rows, (0, 0, 0, missing)) if missing else rows

    def num_kv_heads(self, heads: int, count: int) -> int:
        """Return how many KV heads this rank has, of a model's ``count`` for so many query heads.

        Where there are fewer than ranks, or a number that does not divide, each is there as often
        as it takes, so that a rank's query heads are spread evenly over its KV heads. Where query
        heads do not divide either, no KV head is there twice, and some ranks have more.
        """
        if heads % self.size:
            return self.part(0, count).length
        return math.lcm(count, self.size) // self.size

    def kv_heads(self, heads: int, count: int, width: int) -> TensorPart:
        """Return this rank's rows of a projection to ``count`` KV heads of ``width`` rows."""
        if heads % self.size:
            return self.part(0, count, width)
        own = self.num_kv_heads(heads, count)
        times = own * self.size // count
        places = ((self.rank * own + i) // times for i in range(own))
        return TensorPart.of(0, ((place * width, width) for place in places))


ALONE = Ranks()


class GroupRanks(Ranks):
    """Ranks that are joined by a process group of torch.distributed.

    A CPU's sums are made in the order of the ranks, so that a token's sum does not depend on the
    tokens beside it. gloo's own order differs from place to place, which two ranks alone do not
    notice.

    Args:
        group: of NCCL for tensors on GPUs, of gloo for those on CPUs.
    """

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())
        self._group = group
        self._sum, self._to_first = AllreduceOptions(), GatherOptions()
        self._to_first.rootRank = 0
        # On the stream of the layers: nothing else would run meanwhile.
        self._sum.asyncOp = self._to_first.asyncOp = False

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.size > _COMMUTES and tensor.device.type == "cpu":
            return self._sum_in_order(tensor)
        self._group.allreduce([tensor], self._sum).wait()
        return tensor

    def _sum_in_order(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._group.allgather([parts], [tensor]).wait()
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return tensor.copy_(total)

    def gather(self, columns: Tensor) -> Tensor:
        columns = columns.contiguous()
        parts = [torch.empty_like(columns) for _ in range(self.size)] if self.rank == 0 else []
        self._group.gather([parts] if parts else [], [columns], self._to_first).wait()
        return torch.cat(parts, -1) if parts else columns


def check_size(config: ModelConfig, size: int) -> None:
    """Check that a model can be divided among so many ranks.

    Raises:
        ConfigError: if its heads or the channels of its MLP cannot; it names the sizes that would
            do.
    """
    heads, channels = config.num_attention_heads, config.mlp_size
    kv_heads = getattr(config, "num_key_value_heads", heads)

    def divides(n: int) -> bool:
        return channels % n == 0 and (heads % n == 0 or n <= kv_heads)

    if divides(size):
        return
    sizes = [str(n) for n in range(1, heads + 1) if divides(n)]
    raise ConfigError(
        f"a model of {heads} attention heads, {kv_heads} KV heads and {channels} channels in its "
        f"MLPs cannot be divided among {size} ranks: --tensor-parallel may be {', '.join(sizes)}"
    )
