"""Token sequences of one length, packed from documents."""

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ovexport.errors import DataError
from ovexport.prepare.documents import Documents
from ovexport.recipe import DataSpec

LEAST_SEQUENCES = {"train": 1, "validation": 1, "test": 4}
"""What each split needs at least, or all that the recipe asks for where that is less; fewer test sequences than these
make no interval."""


def pack(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, split: str, *, of_task: bool = False
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tokens of the documents, one after the other, cut to (sequences, sequence_length) int32, and of each token the
    document it is of.

    Documents that stand alone begin as the tokenizer begins a text; where it adds nothing of its own, they end with the
    end-of-sequence token. Parts of a running text are joined by line ends. Where there is less text than the spec asks
    for, validation and test get fewer sequences, down to LEAST_SEQUENCES.

    Args:
        of_task: the documents are a task's examples, of which one sequence is enough in every split.

    Raises:
        DataError: there is too little text.
    """
    stream, ends = token_stream(documents, tokenizer, spec, split)
    count = count_sequences(len(stream), len(documents.texts), spec, split, of_task=of_task)
    shape = (count, spec.sequence_length)
    tokens = np.asarray(stream[: count * spec.sequence_length], dtype=np.int32)
    of_document = np.searchsorted(ends, np.arange(tokens.size), side="right").astype(np.int32)
    return tokens.reshape(shape), of_document.reshape(shape)


def wanted_sequences(spec: DataSpec, split: str) -> int | None:
    """How many sequences the spec asks for; None for all there are."""
    wanted: int | None = getattr(spec, f"{split}_sequences")
    return wanted


def token_stream(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, split: str
) -> tuple[list[int], list[int]]:
    """As many tokens as the split needs, and where each document ends among them."""
    wanted = wanted_sequences(spec, split)
    needed = None if wanted is None else wanted * spec.sequence_length
    stream: list[int] = []
    ends: list[int] = []
    marked = marks_texts(tokenizer)
    for text in documents.texts:
        if documents.running:
            stream += tokenizer(text + "\n", add_special_tokens=False, verbose=False)["input_ids"]
        else:
            stream += tokenizer(text, verbose=False)["input_ids"]
            stream += [] if marked or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ends.append(len(stream))
        if needed is not None and len(stream) >= needed:
            break
    return stream, ends


def count_sequences(tokens: int, documents: int, spec: DataSpec, split: str, *, of_task: bool) -> int:
    """How many sequences so many tokens make.

    Raises:
        DataError: fewer than the split needs.
    """
    available, wanted = tokens // spec.sequence_length, wanted_sequences(spec, split)
    shrinks = of_task or split != "train"
    least = 1 if of_task else LEAST_SEQUENCES[split]
    needed = min(least, wanted or least) if shrinks else wanted or least
    if available < needed:
        at_least = " at least" if shrinks else ""
        raise DataError(
            f"data.{split}: {tokens:,} tokens in {documents:,} documents, and {needed * spec.sequence_length:,} are "
            f"needed{at_least}, for {needed} sequences of {spec.sequence_length}; give more text, or lower "
            f"{'' if shrinks else f'data.{split}_sequences or '}data.sequence_length"
        )
    return available if wanted is None else min(wanted, available)


def tell_fewer(spec: DataSpec, split: str, count: int) -> list[str]:
    """What to say where a split has fewer sequences than were asked for."""
    wanted = wanted_sequences(spec, split)
    if wanted is None or count >= wanted:
        return []
    return [f"data.{split}: its text makes {count} sequences of {spec.sequence_length}, not {wanted}; {count} are used"]


def marks_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer adds tokens of its own to a text."""
    return bool(tokenizer("")["input_ids"])
