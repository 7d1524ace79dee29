"""What the other ranks do: each step of a pass that rank 0 tells of, with the same inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from minserve.engine.device.batch_tensors import BatchLayout
from minserve.engine.device.runner import ModelRunner
from minserve.engine.ranks.group import RankGroup
from minserve.engine.ranks.leading import DTYPES
from minserve.engine.ranks.line import LineEnd, Order, Verb


@torch.inference_mode()
def follow(runner: ModelRunner, group: RankGroup, line: LineEnd) -> None:
    """Take part in passes until rank 0 has gone."""
    while True:
        try:
            order = line.receive()
        except EOFError:
            return
        if order.verb is Verb.FORWARD:
            _forward(runner, group, order)
        elif order.verb is Verb.REPLAY:
            _replay(runner, group, order)
        else:
            _logits(runner, group, order)


def _forward(runner: ModelRunner, group: RankGroup, order: Order) -> None:
    if runner.threads is not None:
        runner.threads.before_pass()
    *sizes, num_decodes = order.numbers[:4]
    layout = BatchLayout(*sizes)
    inputs = torch.empty(layout.size, dtype=torch.int64, device=runner.device)
    _take(group, order, inputs)
    parts = layout.split(inputs)
    if inputs.device.type == "cpu":
        starts, lengths = parts.starts.tolist(), parts.lengths.tolist()
    else:
        told = order.payload.tolist()
        starts, lengths = told[: layout.num_seqs + 1], told[layout.num_seqs + 1 :]
    runner.forward_tensors(parts, starts, lengths, num_decodes, runner.kv)


def _replay(runner: ModelRunner, group: RankGroup, order: Order) -> None:
    assert runner.graphs is not None, "rank 0 has recorded the same graphs"
    runner.graphs.replay(order.numbers[0], lambda buffer: _take(group, order, buffer))


def _take(group: RankGroup, order: Order, buffer: Tensor) -> None:
    """Put the packed inputs of a pass where it reads them."""
    if buffer.device.type == "cpu":
        buffer.copy_(order.payload)
    else:
        group.ranks.broadcast(buffer)


def _logits(runner: ModelRunner, group: RankGroup, order: Order) -> None:
    num_rows, width, dtype = order.numbers[:3]
    hidden = torch.empty(num_rows, width, dtype=DTYPES[dtype], device=runner.device)
    runner.model.logits(group.ranks.broadcast(hidden))
