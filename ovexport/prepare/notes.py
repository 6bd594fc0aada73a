"""What the reader of the figures has to know of the text."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from ovexport.prepare.documents import Documents
from ovexport.prepare.sequences import marks_texts


def notes_on(
    tokenizer: PreTrainedTokenizerBase, splits: Mapping[str, Documents], *, generates: bool
) -> tuple[str, ...]:
    """What a tokenizer without an end-of-sequence token means for the sequences and the examples."""
    if tokenizer.eos_token_id is not None:
        return ()
    apart = [name for name, documents in splits.items() if not documents.running and len(documents.texts) > 1]
    notes = []
    if apart and not marks_texts(tokenizer):
        notes.append(
            f"the tokenizer has no end-of-sequence token: the documents of {', '.join(apart)} run together in the "
            "sequences, with nothing between them; set eos_token in tokenizer_config.json"
        )
    if generates:
        notes.append(
            "the tokenizer has no end-of-sequence token: the task's examples don't show where an answer ends; set "
            "eos_token in tokenizer_config.json"
        )
    return tuple(notes)
