"""Which batches run eagerly, where passes over decodes are CUDA graphs.

One rule for whoever runs batches (`minserve.engine.device.paged_model`), plans them, or predicts how
long they take: an eager pass has each of its kernels launched by the host, which a GPU may
wait for, and a graph has all of them launched at once.
"""

from __future__ import annotations


def is_eager(num_seqs: int, num_decodes: int) -> bool:
    """True where some sequence of a batch does not decode: graphs are of decodes alone.

    They are recorded for as many sequences, tokens and tokens of a sequence as a core may run,
    so that no batch of decodes is beyond them.

    Args:
        num_decodes: how many of the sequences decode, verifications of drafts included.
    """
    return num_decodes < num_seqs
