"""What a tuned model says of held-out text: the logits that a product's are compared with."""

import numpy as np
import torch
from numpy.typing import NDArray

from ovexport.models.student import Student

_ELEMENTS = 2**22
_LENGTH = 64
_FEWEST_POSITIONS = 32


@torch.no_grad()
def reference_logits(student: Student, tokens: NDArray[np.int32]) -> dict[str, NDArray[np.generic]]:
    """The logits of the first tokens, in float32 whatever the student computed in; it is in float32 from here on.

    Args:
        tokens: (sequences, length).

    Returns:
        `token_ids` (sequences, length) int32 and `logits` (sequences, length, vocabulary) float32, of about 4 million
        logits in all.
    """
    student.in_float32()
    network = student.network
    positions = max(_FEWEST_POSITIONS, _ELEMENTS // network.config.get_text_config().vocab_size)
    length = min(tokens.shape[1], positions, _LENGTH)
    sample = tokens[: positions // length, :length]
    ids = torch.from_numpy(sample.astype(np.int64)).to(network.device)
    logits = [network(input_ids=row[None], use_cache=False).logits.float().cpu().numpy() for row in ids]
    return {"token_ids": sample, "logits": np.concatenate(logits)}
