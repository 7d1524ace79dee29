"""The one rule which batches run eagerly on a device where passes over decodes are CUDA graphs.

The code that runs batches (`minserve.engine.device.paged_model`), the code that plans them, and the
code that predicts how long they take all use it. In an eager pass the host launches each kernel,
and the GPU may wait for the host; a graph launches all of its kernels at once.
"""

from __future__ import annotations


def is_eager(num_seqs: int, num_decodes: int) -> bool:
    """Return True if a sequence of a batch does not decode: graphs hold decodes alone.

    Graphs are recorded for as many sequences, tokens, and tokens of a sequence as a core may run.
    So no batch of decodes is too large for them.

    Args:
        num_seqs: number of sequences in the batch.
        num_decodes: number of these that decode, verifications of drafts included.
    """
    return num_decodes < num_seqs
