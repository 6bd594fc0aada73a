"""A task's rows, and the examples that they make: a question with its answer, each by itself."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ovexport.errors import DataError


@dataclass(frozen=True, slots=True)
class TaskData:
    """A task's rows as lm-evaluation-harness reads them, and of each a question and its right answer, by split."""

    rows: dict[str, list[dict[str, Any]]]
    answered: dict[str, list[tuple[str, str]]]
    generates: bool


def examples(task: TaskData, tokenizer: PreTrainedTokenizerBase, longest: int) -> dict[str, NDArray[np.generic]]:
    """Tokens of the examples to tune on and to validate with, as PreparedData.examples reads them.

    A question that does not fit before its answer loses its beginning. Where answers are generated, the token that ends
    a text is part of them.

    Raises:
        DataError: an answer is longer than `longest` tokens.
    """
    from ovexport.tasks.asked import AskedModel  # of an extra

    encode = AskedModel(tokenizer).encode
    ending = [tokenizer.eos_token_id] if task.generates and tokenizer.eos_token_id is not None else []
    tensors: dict[str, NDArray[np.generic]] = {}
    for split in ("train", "validation"):
        tokens: list[int] = []
        ends, answers = [0], []
        for number, pair in enumerate(task.answered[split], 1):
            question, answer = encode(*pair)
            answer += ending
            if len(answer) >= longest:
                raise DataError(
                    f"task: {split} row {number}: its answer has {len(answer)} tokens, and "
                    f"data.sequence_length={longest} has to hold some of the question too; raise it"
                )
            tokens += [*question[-(longest - len(answer)) :], *answer]
            answers.append(len(tokens) - len(answer) - ends[-1])
            ends.append(len(tokens))
        tensors |= {
            f"{split}.tokens": np.array(tokens, dtype=np.int32),
            f"{split}.ends": np.array(ends[1:], dtype=np.int64),
            f"{split}.answers": np.array(answers, dtype=np.int64),
        }
    return tensors
