"""What would stop the stage, found before any work: the text is read as the stage will read it, and as much of it is
tokenized as the sizes need."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ovexport.checking import Caution, Finding, raised
from ovexport.errors import DataError, OvexportError, RecipeError
from ovexport.models.loading import load_own_tokenizer
from ovexport.prepare.documents import Documents, checked_documents
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
    missing, unread = missing_files(data, task), list(_on_the_hub(data, task))
    findings += [*missing, *unread]
    task_here = task if task and task.files else None
    text_is_here = not any(source.hub for source in named_sources(data).values())
    if missing or not text_is_here or not (data.train or task_here):
        return Survey(findings=tuple(findings))
    try:
        splits, _, answered_rows = read_splits(data, task_here)
        if answered_rows:
            examples(answered_rows, tokenizer, data.sequence_length)
    except OvexportError as error:
        return Survey(findings=(*findings, error))
    notes = notes_on(tokenizer, splits, generates=answered_rows is not None and answered_rows.generates)
    sequences, of_sizes = _sizes(splits, tokenizer, data)
    findings += [*(Caution(note) for note in notes), *of_sizes]
    return Survey(sequences, splits["test"].texts, checked_documents(splits), tuple(findings))


def _on_the_hub(data: DataSpec, task: TaskSpec | None) -> Iterator[Caution]:
    """What is not looked at before the run."""
    for key, source in named_sources(data).items():
        if source.hub:
            yield Caution(f"{key}: {source.hub} is on the hub, and is read when the run starts")
    if task and not task.files:
        yield Caution(f"task.name={task.name}: its rows are on the hub, and are read when the run starts")


def _sizes(
    splits: Mapping[str, Documents], tokenizer: PreTrainedTokenizerBase, data: DataSpec
) -> tuple[dict[str, int], list[Finding]]:
    """How many sequences each split will have, where that is known, and what is wrong with these sizes."""
    sequences: dict[str, int] = {}
    findings: list[Finding] = []
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
    return sequences, findings
