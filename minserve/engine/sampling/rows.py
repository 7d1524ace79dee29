"""`SamplingRow`: a place where a token is to be chosen. And numbers for each row, as tensors."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
from torch import Tensor

from minserve.kernels.upload import to_device
from minserve.request import Sequence
from minserve.sampling_params import SamplingParams


class SamplingRow(NamedTuple):
    """A place where a token is to be chosen: behind a sequence's tokens and some drafted ones."""

    seq: Sequence
    drafted: tuple[int, ...] = ()

    @property
    def params(self) -> SamplingParams:
        return self.seq.request.params

    @property
    def position(self) -> int:
        """The position of the token in the output, from 0 on."""
        return self.seq.num_output_tokens + len(self.drafted)

    @property
    def token_ids(self) -> list[int]:
        """The ids of all tokens before it."""
        return self.seq.token_ids + list(self.drafted) if self.drafted else self.seq.token_ids

    @property
    def output_token_ids(self) -> list[int]:
        """The ids of the output's tokens before it."""
        return self.seq.output_token_ids + list(self.drafted)

    def newest(self, num: int) -> tuple[int, ...]:
        """Return the ids of so many tokens before it, fewer than all: the newest ones."""
        return (*self.seq.token_ids[-num:], *self.drafted)[-num:]

    @property
    def is_seeded(self) -> bool:
        """True where the request chose its seed, so that its output must be reproducible."""
        return self.params.seed is not None

    @property
    def must_go_on(self) -> bool:
        """True where the tokens that end the output are not allowed yet."""
        return self.position < self.params.min_tokens

    @property
    def is_plain(self) -> bool:
        """True where the raw logits' argmax is the answer."""
        params = self.params
        return params.greedy and not params.adjusts_logits and not self.must_go_on


def index_of(rows: SequenceOf[int] | SequenceOf[SequenceOf[int]], like: Tensor) -> Tensor:
    return to_device(rows, torch.long, like.device)


def column(values: SequenceOf[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return one number per row, ``[rows, 1]``."""
    return to_device(values, dtype, like.device).unsqueeze(1)
