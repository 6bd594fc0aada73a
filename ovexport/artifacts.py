"""What a stage leaves on disk: the layout of a run, layer formats, atomic writes, integrity.

A finished stage has a record in `stages/` that holds the digest of all that was upstream of it and of each file it
wrote. A stage whose record matches is not done again; one whose files changed behind its back is.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ovexport.bounded import parse_json
from ovexport.errors import ArtifactError, OvexportError
from ovexport.foreign import NO_SPACE, exhausted
from ovexport.tensorfile import TensorFile
from ovexport.textfile import read_text, split_lines

FORMAT_VERSION = 3
IR_MANIFEST = "ovexport.json"

RUN_FILES = (
    "README.md",
    "report.html",
    "recipe.toml",
    "verification.json",
    "evaluation.json",
    "benchmark.json",
    "gates.json",
)
"""What of a run lies beside the product's files once it is uploaded."""

MODELS = ("bf16", "plain", "int4")
"""The IRs of a run, in the order in which they are compared; the last one is the product."""

Mode = Literal["int4_asym", "int4_sym", "int8_asym", "int8_sym", "float"]
BITS = {"int4_asym": 4, "int4_sym": 4, "int8_asym": 8, "int8_sym": 8}
LEVELS = {"int4_asym": (0, 15), "int4_sym": (-8, 7), "int8_asym": (0, 255), "int8_sym": (-128, 127)}


class Record(BaseModel):
    """Base of what crosses a file boundary as JSON: strict and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class LayerFormat(Record):
    """The fate of one weight matrix.

    Attributes:
        name: the parameter in the PyTorch model, such as "model.layers.0.mlp.down_proj.weight".
        kind: the layer the parameter belongs to; "head" is the output embedding when it has weights of its own.
        mode: type of its codes; "float" when it is left alone.
        out_features, in_features: shape of the matrix as (output, input); for an embedding (vocabulary, width).
        transposed: the PyTorch parameter is stored as (input, output), as GPT-2's Conv1D does.
        group_size: input channels per scale; in_features when there is one scale per output channel.
        rank: of its adapter; 0 without one.
        active_rank: how many of the adapter's rows of A and columns of B, from the first, are in use (FQ_LORA_NLS);
            all of them when None.
        arithmetic: how codes follow from weight, adapters and ranges: "ovexport" as in `quantization`, "nncf" as in
            `nncf_quantizer`, of a checkpoint that was tuned with NNCF.
        note: why it is not as the recipe asked, None when it is.
    """

    name: str
    kind: Literal["linear", "embedding", "head"]
    mode: Mode
    out_features: int
    in_features: int
    transposed: bool = False
    group_size: int
    rank: int = 0
    active_rank: int | None = None
    arithmetic: Literal["ovexport", "nncf"] = "ovexport"
    note: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.group_size < 1 or self.in_features % self.group_size:
            raise ValueError(f"group_size={self.group_size} does not divide in_features={self.in_features}")
        if self.active_rank is not None and not 0 <= self.active_rank <= self.rank:
            raise ValueError(f"active_rank={self.active_rank} is not within its adapter's rank={self.rank}")
        return self

    @property
    def symmetric(self) -> bool:
        """Whether codes are signed and there is no zero point."""
        return self.mode in ("int4_sym", "int8_sym")

    @property
    def used_rank(self) -> int:
        """Rank of the product B·A that is added to the weight."""
        return self.rank if self.active_rank is None else self.active_rank

    @property
    def groups(self) -> int:
        """Scales per output channel."""
        return self.in_features // self.group_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes, float16 scales and zero points in the IR; 0 for a layer left in floating point."""
        if self.mode == "float":
            return 0
        bits = BITS[self.mode]
        scales = self.out_features * self.groups
        zero_points = 0 if self.symmetric else -(-scales * bits // 8)
        return -(-self.out_features * self.in_features * bits // 8) + 2 * scales + zero_points


class CodeDigest(Record):
    """SHA-256 of a layer's unpacked codes (one byte each), float16 scales and unpacked zero points."""

    codes: str
    scale: str
    zero_point: str | None


class CheckpointManifest(Record):
    """checkpoint.json: what was compressed, from which weights, and the codes the last tuning step used.

    Attributes:
        model_id, revision: the base model as the recipe named it.
        weight_digests: SHA-256 of each compressed parameter's bytes in the base model, (output, input) order.
        changed: parameters whose weights the method replaced (AWQ, GPTQ); they are in weights.safetensors.
        digests: of the codes that tuning ended with, by layer.
        steps: of the kept parameters; 0 for the twin, and where no step validated better than the start; None for a
            checkpoint that another tool tuned.
        validation_kl_nats, validation_nll_nats: of the kept step, by what was tuned for, the mean divergence per token
            of text, or the negative log-likelihood per token of the answers; None for a starting point, and for a model
            that can't be tuned.
        rank_space: ranks that an adapter can have (FQ_LORA_NLS), largest first; empty for adapters used whole.
        rank_by: what has a rank of its own, a transformer block or a Linear.
    """

    format_version: Literal[1] = 1
    model_id: str
    revision: str | None
    layers: tuple[LayerFormat, ...]
    weight_digests: dict[str, str]
    changed: tuple[str, ...] = ()
    digests: dict[str, CodeDigest]
    steps: int | None = 0
    validation_kl_nats: float | None = None
    validation_nll_nats: float | None = None
    rank_space: tuple[int, ...] = ()
    rank_by: Literal["block", "linear"] = "block"
    versions: dict[str, str]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        names = {layer.name for layer in self.layers}
        if set(self.weight_digests) != names or set(self.digests) != {layer.name for layer in self.packed}:
            raise ValueError("its digests are not of its layers")
        return self

    @property
    def packed(self) -> tuple[LayerFormat, ...]:
        """The layers that are quantized."""
        return tuple(layer for layer in self.layers if layer.mode != "float")


class PackedManifest(Record):
    """packed.json: the layers whose codes lie in packed.safetensors, and where their weights came from.

    Attributes:
        model_id, revision: the base model as the recipe named it.
        checkpoint_files: SHA-256 of each file of the checkpoint that was packed.
        tuning_steps: the checkpoint's `steps`.
    """

    format_version: Literal[1] = 1
    model_id: str
    revision: str | None
    layers: tuple[LayerFormat, ...]
    weight_digests: dict[str, str]
    changed: tuple[str, ...] = ()
    checkpoint_files: dict[str, str]
    tuning_steps: int | None = None


class IRManifest(Record):
    """ovexport.json in a product's folder: what it was made from, and what it was when it was made.

    Attributes:
        model_id, revision: the base model as the recipe named it.
        checkpoint_files: SHA-256 of each file of the checkpoint that it was made from.
        files: SHA-256 of each other file of the folder.
        tuning_steps: of the parameters that were kept: 0 without tuning, None where it is not known.
    """

    format_version: Literal[1] = 1
    model_id: str
    revision: str | None
    checkpoint_files: dict[str, str]
    tuning_steps: int | None = None
    files: dict[str, str]
    versions: dict[str, str]


class DataManifest(Record):
    """data.json: what the sequences hold.

    Attributes:
        documents, sequences: counts by split.
        examples: of the task, counts by split.
        dropped_duplicates: documents that stood in an earlier split too and were left out of the later one.
        test_words: whitespace-separated words in the text of the test sequences, for the word perplexity; 0 where the
            text is not written in words between blanks, as `test_words_reason` says.
        notes: what the reader of the figures has to know of the text.
    """

    sequence_length: int
    documents: dict[str, int]
    sequences: dict[str, int]
    examples: dict[str, int] = {}
    dropped_duplicates: int
    test_words: int
    test_words_reason: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its answer.

    Attributes:
        tokens: (length,) int32.
        answer: index of the answer's first token.
    """

    tokens: NDArray[np.int32]
    answer: int


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A folder with data.json, tokens.safetensors (train, validation and test, each (sequences, length) int32, and
    `test.documents`, of the same shape, the document of each test token) and test_documents.json (the texts of the test
    split).

    Where the recipe has a task, examples.safetensors too: for train and validation `SPLIT.tokens` of all examples one
    after the other, int32, `SPLIT.ends`, where each ends, and `SPLIT.answers`, at which of its own tokens its answer
    begins, int64; and task_rows.json, the rows of every split as lm-evaluation-harness's task reads them.
    """

    path: Path

    @property
    def exists(self) -> bool:
        """Whether the folder is one."""
        return (self.path / "data.json").is_file()

    @property
    def manifest(self) -> DataManifest:
        """data.json, checked."""
        return read_record(self.path / "data.json", DataManifest)

    def tokens(self, split: str) -> NDArray[np.int32]:
        """The sequences of a split."""
        return TensorFile(self.path / "tokens.safetensors").require(split)

    @property
    def token_documents(self) -> NDArray[np.int32] | None:
        """Which document each token of the test split is of; None where they are parts of one running text."""
        return TensorFile(self.path / "tokens.safetensors").get("test.documents")

    def examples(self, split: str) -> list[Example]:
        """The task's examples of train or validation."""
        file = TensorFile(self.path / "examples.safetensors")
        tokens, ends = file.require(f"{split}.tokens"), file.require(f"{split}.ends")
        begins = np.concatenate([[0], ends[:-1]])
        bounds = zip(begins, ends, file.require(f"{split}.answers"), strict=True)
        return [Example(tokens[begin:end], int(answer)) for begin, end, answer in bounds]

    @property
    def task_rows(self) -> dict[str, list[dict[str, Any]]]:
        """The task's rows, by split.

        Raises:
            ArtifactError: the file is missing or corrupt.
        """
        return dict(self._read_json("task_rows.json"))

    @property
    def test_documents(self) -> list[str]:
        """The texts of the test split.

        Raises:
            ArtifactError: the file is missing or corrupt.
        """
        return [str(text) for text in self._read_json("test_documents.json")]

    def _read_json(self, name: str) -> Any:
        path = self.path / name
        try:
            return parse_json(read_text(path), largest=path.stat().st_size)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path}: can't be read ({error}); run the stage prepare again") from error


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with checkpoint.json, adapters.safetensors, reference.safetensors when it was tuned here, and
    weights.safetensors where a method changed weights.

    adapters.safetensors holds per layer `NAME.input_low` and `NAME.input_range`, (output, groups, 1) float32, or
    `NAME.scale` for symmetric ones, and `NAME.lora_A` (rank, input), `NAME.lora_B` (output, rank), float32. A layer
    with NNCF's arithmetic has what `nncf_quantizer.NncfQuantizer.stored` gives.
    reference.safetensors holds what the tuned model says of held-out text, in float32 throughout: `token_ids`
    (sequences, length) int32 and `logits` (sequences, length, vocabulary) float32.
    """

    path: Path

    @property
    def manifest(self) -> CheckpointManifest:
        """checkpoint.json, checked."""
        return read_record(self.path / "checkpoint.json", CheckpointManifest)

    @property
    def adapters(self) -> TensorFile:
        """Adapters and quantization parameters."""
        return TensorFile(self.path / "adapters.safetensors")

    @property
    def weights(self) -> TensorFile:
        """The weights that the method changed."""
        return TensorFile(self.path / "weights.safetensors")

    @property
    def reference(self) -> TensorFile | None:
        """The tuned model's logits of held-out text; None where none were recorded."""
        path = self.path / "reference.safetensors"
        return TensorFile(path) if path.is_file() else None

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of each file, by name."""
        return {file.relative_to(self.path).as_posix(): file_digest(file) for file in files_in(self.path)}


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """A folder with packed.json and packed.safetensors.

    Per layer `NAME.codes` (u4 and i4 two to a byte, low nibble first; u8; i8), `NAME.scale` float16 and, where
    asymmetric, `NAME.zero_point` packed like the codes; `NAME` itself for a weight that the method changed.
    """

    path: Path

    @property
    def manifest(self) -> PackedManifest:
        """packed.json, checked."""
        return read_record(self.path / "packed.json", PackedManifest)

    @property
    def tensors(self) -> TensorFile:
        """Codes, scales and zero points."""
        return TensorFile(self.path / "packed.safetensors")


@dataclass(frozen=True, slots=True)
class IR:
    """A folder that openvino-genai and optimum-intel load: openvino_model.xml / .bin, tokenizers, configurations."""

    path: Path

    @property
    def xml(self) -> Path:
        """The graph."""
        return self.path / "openvino_model.xml"

    @property
    def bin(self) -> Path:
        """The weights."""
        return self.path / "openvino_model.bin"

    @property
    def weight_bytes(self) -> int:
        """Size of the .bin."""
        return self.bin.stat().st_size

    @property
    def manifest(self) -> IRManifest | None:
        """ovexport.json, checked; None for an IR that another tool made."""
        path = self.path / IR_MANIFEST
        return read_record(path, IRManifest) if path.is_file() else None

    def require(self) -> "IR":
        """Itself, when its graph and weights are there.

        Raises:
            ArtifactError: they are not.
        """
        for file in (self.xml, self.bin):
            if not file.is_file():
                raise ArtifactError(f"{file}: missing; give a folder with an OpenVINO IR, made by run or convert")
        return self


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where everything of a run lies."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe with every default spelled out."""
        return self.path / "recipe.toml"

    @property
    def data(self) -> PreparedData:
        """Token sequences and prompts."""
        return PreparedData(self.path / "data")

    @property
    def compressed(self) -> Checkpoint:
        """The starting point of tuning, and the plain twin's checkpoint."""
        return Checkpoint(self.path / "compressed")

    @property
    def checkpoint(self) -> Checkpoint:
        """What was tuned."""
        return Checkpoint(self.path / "checkpoint")

    def packed(self, name: str) -> PackedWeights:
        """Packed weights of "plain" or "int4"."""
        return PackedWeights(self.path / "packed" / name)

    def ir(self, name: str) -> IR:
        """The IR of "bf16", "plain" or "int4"."""
        return IR(self.path / name)

    @property
    def search(self) -> Path:
        """How the ranks of elastic adapters were chosen."""
        return self.path / "search.json"

    @property
    def gates(self) -> Path:
        """How the figures stand to the recipe's limits; not there where it has none."""
        return self.path / "gates.json"

    @property
    def stages(self) -> Path:
        """A record per finished stage; the folder marks a run as ours."""
        return self.path / "stages"

    def stage_record(self, stage: str) -> Path:
        """The record of a finished stage."""
        return self.stages / f"{stage}.json"

    @property
    def logs(self) -> Path:
        """TensorBoard, tuning.jsonl and run.log."""
        return self.path / "logs"


class StageRecord(Record):
    """A finished stage: what it was made from and what it wrote.

    Attributes:
        digest: SHA-256 over the recipe sections and the upstream stages that it depends on.
        files: SHA-256 of each file written, by path relative to the run.
    """

    stage: str
    digest: str
    files: dict[str, str]
    seconds: float
    versions: dict[str, str]


PARTIAL, REPLACED = ".partial", ".replaced"
"""How the names of what is being written end, and of what it takes the place of; both begin with a point."""

_FULL_DISK_BYTES = 1 << 20
_NO_PLACE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENOENT,
    errno.ENAMETOOLONG,
)

AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


def read_record(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """Read and check a JSON record.

    Raises:
        ArtifactError: the file is missing, or is not such a record.
    """
    try:
        return kind.model_validate_json(read_text(path))
    except FileNotFoundError:
        raise ArtifactError(
            f"{path}: missing; give the folder that holds it, or run the stage that writes it"
        ) from None
    except (OSError, ValueError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).splitlines()[-1]
        raise ArtifactError(f"{path}: not a {kind.__name__} ({first}); make it again") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line; a line that a kill cut short is left out, and no file holds none."""
    lines = split_lines(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else []
    found = []
    for line in lines:
        with suppress(ValueError, TypeError):
            found.append(dict(parse_json(line)))
    return found


def write_record(record: BaseModel, path: Path) -> None:
    """Write a JSON record atomically."""
    write_text(record.model_dump_json(indent=2) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a text file atomically: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    with translated_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to write into, which takes the place of `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    shutil.rmtree(temporary, ignore_errors=True)
    with translated_disk_errors(path):
        temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException as error:
        full = shutil.disk_usage(temporary).free < _FULL_DISK_BYTES
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        if full:  # openvino hides ENOSPC in errors of its own
            raise _full_disk(path) from error
        ours = None if isinstance(error, OvexportError) else exhausted(error, str(path))
        if ours is None:
            raise
        raise ours from error
    with translated_disk_errors(path):
        for file in files_in(temporary):
            _fsync(file)
        replaced = path.with_name(f".{path.name}{REPLACED}")
        shutil.rmtree(replaced, ignore_errors=True)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def translated_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, or a place that can't be written, into one clear line.

    Raises:
        ArtifactError: the disk is full, or the folder can't be written.
    """
    try:
        yield
    except OvexportError:
        raise
    except Exception as error:
        ours = exhausted(error, str(path))
        if ours is not None:
            raise ours from error
        if not isinstance(error, OSError):
            raise
        if error.errno in _NO_PLACE:
            raise ArtifactError(f"{path}: can't be written ({error.strerror}); choose another --out") from error
        raise


def _full_disk(path: Path) -> ArtifactError:
    return ArtifactError(f"{path}: {'; '.join(NO_SPACE)}")


def existing_parent(path: Path) -> Path:
    """The nearest folder at or above a path that is there."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())


def files_in(path: Path) -> list[Path]:
    """Every file below a folder, sorted; the file itself when it is one."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_digest(data: Any) -> str:
    """SHA-256 of a contiguous buffer."""
    return hashlib.sha256(memoryview(data).cast("B")).hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_files(files: Mapping[str, str], root: Path) -> list[str]:
    """The paths that lead out of `root`, are missing there, or whose SHA-256 is not the one given."""
    return [
        name
        for name, digest in files.items()
        if leaves_folder(name) or not (root / name).is_file() or file_digest(root / name) != digest
    ]


def leaves_folder(name: str) -> bool:
    """Whether a path is no plain one below a folder: absolute, or by way of `..`, on this system or another."""
    return any(
        path.is_absolute() or bool(path.drive) or ".." in path.parts or not path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
