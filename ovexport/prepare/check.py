"""What would stop the stage, found before any work: the text is read as the stage will read it, and as much of it is
tokenized as the sizes need."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ovexport.checking import Caution, Finding, raised
from ovexport.errors import DataError, OvexportError, RecipeError
from ovexport.models.loading import load_own_tokenizer
from ovexport.prepare.documents import checked_documents
from ovexport.prepare.examples import examples
from ovexport.prepare.notes import notes_on
from ovexport.prepare.reading import missing_files, named_sources, read_splits
from ovexport.prepare.sequences import count_sequences, tell_fewer, token_stream, wanted_sequences
from ovexport.recipe import DataSpec, ModelSpec, TaskSpec
from ovexport.tasks import require_harness


def check(model: ModelSpec, task: TaskSpec | None, text: "Survey") -> Iterator[Finding]:
    """Every problem of the stage.

    Args:
        text: what it holds.
    """
    if task is not None:
        yield from raised(require_harness)
    yield from raised(load_own_tokenizer, model)
    yield from text.findings


@dataclass(frozen=True, slots=True)
class Survey:
    """What the text holds, looked at before any work.

    Attributes:
        sequences: how many each split will have, where that is known.
        test_documents: the texts of the test split; None where they are not known.
        checked_documents: the texts that prepare lets go through the IR's tokenizer.
        findings: what stops the stage, and what it does otherwise than asked.
    """

    sequences: dict[str, int] = field(default_factory=dict)
    test_documents: list[str] | None = None
    checked_documents: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


def survey(tokenizer: PreTrainedTokenizerBase, data: DataSpec, task: TaskSpec | None, positions: int | None) -> Survey:
    """Look at the text as prepare will read it, and tokenize as much of it as the sizes need.

    What is on the hub is not fetched for that; a text that is split with it is not looked at either.

    Args:
        positions: how many tokens the model can read; None where it has no limit.
    """
    findings: list[Finding] = []
    if positions is not None and data.sequence_length > positions:
        told = f"data.sequence_length={data.sequence_length}: the model reads {positions} tokens at most"
        findings.append(RecipeError(f"{told}; lower it to {positions}"))
    missing = missing_files(data, task)
    remote = {key: source.hub for key, source in named_sources(data).items() if source.hub}
    task_here = task if task and task.files else None
    findings += missing
    findings += [Caution(f"{key}: {hub} is on the hub, and is read when the run starts") for key, hub in remote.items()]
    if task and not task_here:
        findings.append(Caution(f"task.name={task.name}: its rows are on the hub, and are read when the run starts"))
    if missing or remote or not (data.train or task_here):
        return Survey(findings=tuple(findings))
    try:
        splits, _, found = read_splits(data, task_here)
        if found:
            examples(found, tokenizer, data.sequence_length)
    except OvexportError as error:
        return Survey(findings=(*findings, error))
    notes = notes_on(tokenizer, splits, generates=found is not None and found.generates)
    findings += [Caution(note) for note in notes]
    sequences: dict[str, int] = {}
    looked_at = data.model_copy(update={"train_sequences": data.train_sequences or 1})
    for split, documents in splits.items():
        try:
            stream, _ = token_stream(documents, tokenizer, looked_at, split)
            count = count_sequences(len(stream), len(documents.texts), looked_at, split, of_task=data.train is None)
        except DataError as error:
            findings.append(error)
            continue
        findings += [Caution(text) for text in tell_fewer(data, split, count)]
        if wanted_sequences(data, split) is not None:
            sequences[split] = count
    return Survey(sequences, splits["test"].texts, checked_documents(splits), tuple(findings))
