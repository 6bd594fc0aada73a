"""What a reader of checkpoints is: the protocol, the base weights it reads them onto, and the registry of readers."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

from torch import Tensor
from transformers import PreTrainedModel

from ovexport.artifacts import Checkpoint
from ovexport.errors import ArtifactError, RecipeError
from ovexport.models.architecture import Architecture
from ovexport.models.checkpoint import write_checkpoint
from ovexport.models.loading import load_model
from ovexport.models.matrix_view import weight_digest
from ovexport.recipe import ModelSpec
from ovexport.registry import Registered, Registry
from ovexport.weights.group_sizes import check_group_sizes
from ovexport.weights.layer import LayerFormat, WeightMatrix
from ovexport.weights.quantizer import Quantizer

ZeroPoints = Literal["float16", "codes"]
"""The type of zero points that take an adapter up: float16, or codes as any other model has them."""


@dataclass(frozen=True, slots=True)
class BaseWeights:
    """The model that a checkpoint was tuned on, whose weights the checkpoint is read onto.

    Attributes:
        spec: its name.
        network: the model, on the CPU, in the type of its files.
        matrices: its weight matrices; `name` is the parameter's.
        weights: of each the values, (output, input), by name; read only.
    """

    spec: ModelSpec
    network: PreTrainedModel
    matrices: tuple[WeightMatrix, ...]
    weights: Mapping[str, Tensor]

    @classmethod
    def load(cls, spec: ModelSpec) -> Self:
        """Load it.

        Raises:
            UnsupportedModelError: it can't be loaded, or has weights that can't be compressed.
        """
        network = load_model(spec)
        architecture = Architecture(network)
        matrices = architecture.matrices()
        weights = {matrix.name: architecture.matrix(matrix.name).read() for matrix in matrices}
        return cls(spec, network, matrices, weights)

    def write(
        self,
        out: Path,
        layers: Sequence[LayerFormat],
        quantizers: Mapping[str, Quantizer],
        replaced_weights: Mapping[str, Tensor],
    ) -> Checkpoint:
        """Write a checkpoint of ours.

        Args:
            layers: the format of every matrix, in the order of `matrices`.
            quantizers: of the layers that have an encoding, by name.
            replaced_weights: what the checkpoint has in the place of the base model's weights, (output, input) float32.
        """
        digests = {name: weight_digest(weight) for name, weight in self.weights.items()}
        return write_checkpoint(
            out, self.spec, tuple(layers), digests, self.weights, quantizers, replaced_weights, steps=None
        )


class CheckpointReader(Protocol):
    """Reads a checkpoint that some tool tuned, and writes it as a checkpoint of ours.

    `ovexport convert` asks the readers in turn, ours first, which of them recognizes the path that it was given; the
    first that does reads it. Derive from this class and register it by a name:

        from ovexport.readers import BaseWeights, CheckpointReader, readers

        @readers.register("deltas")                    # or an entry point in the group "ovexport.readers"
        class Deltas(CheckpointReader):
            takes = "a file of deltas"

            def recognizes(self, path):
                return path.suffix == ".deltas"

            def read(self, path, model, out, *, ranks):
                base = BaseWeights.load(model)
                layers = [...]      # a LayerFormat of each of base.matrices: `plan_layers`, or `format_layer`
                quantizers = {...}  # by name, a FakeQuantizer of each layer with an encoding, set to the file's values
                return base.write(out, layers, quantizers, {})

    Nothing of the file or folder is executed: no pickle, no code that it brings. What does not suit the base model is
    refused, not guessed: a wrong checkpoint converts without an error and answers nonsense.

    Attributes:
        takes: what it reads, in a few words for messages, such as "a folder with checkpoint.json".
        is_model: what it reads is a model of its own, so that no base model is given.
        has_ranks: its checkpoints may leave the ranks of elastic adapters open, which `--ranks` then chooses.
        has_zero_points: what it reads is absorbed into zero points, whose type `--zero-points` then chooses.
        zero_points: that type.
    """

    takes: str
    is_model: bool = False
    has_ranks: bool = False
    has_zero_points: bool = False
    zero_points: ZeroPoints = "float16"

    @abstractmethod
    def recognizes(self, path: Path) -> bool:
        """Whether an existing file or folder is of its kind, from names and first bytes; damaged ones are its own
        too, so that `read` says what is wrong with them."""

    @abstractmethod
    def read(self, path: Path, model: ModelSpec, out: Path, *, ranks: Sequence[int] | None) -> Checkpoint:
        """The checkpoint as one of ours.

        Args:
            model: the base model that the user says it was tuned on.
            out: the folder to write it to; it does not exist, and its parent may not either.
            ranks: as `--ranks` gives them, None without; always None unless `has_ranks`.

        Returns:
            What was written to `out`; or, where it is ours already, the checkpoint where it lies.

        Raises:
            ArtifactError: it is corrupt, or of another base model.
            RecipeError: `ranks` does not suit it.
            UnsupportedModelError: it holds what can't be represented.
        """


readers: Registry[type[CheckpointReader]] = Registry("ovexport.readers", "reader of checkpoints")
"""Readers by name, in the order in which they are asked."""


def read_checkpoint(
    path: Path,
    model: ModelSpec,
    out: Path,
    *,
    ranks: Sequence[int] | None = None,
    zero_points: ZeroPoints | None = None,
) -> Checkpoint:
    """Read whatever checkpoint there is at a path.

    Args:
        out: the folder for a checkpoint that is not one of ours already.
        ranks: of elastic adapters whose checkpoint leaves them open.
        zero_points: of a checkpoint that is absorbed into them, their type; "float16" when None.

    Raises:
        ArtifactError: nothing is there, no reader recognizes it, or it is corrupt or of another base model.
        RecipeError: `ranks` or `zero_points` does not suit it.
        PlugInError: a reader of a plug-in fails.
        UnsupportedModelError: it holds what can't be represented, or what the runtime computes wrongly.
    """
    registered = _reader_of(path)
    reader = registered.thing()
    if ranks is not None and not reader.has_ranks:
        raise RecipeError(f"--ranks: {path} is {reader.takes}, which has its ranks in it; leave --ranks out")
    if zero_points is not None:
        if not reader.has_zero_points:
            raise RecipeError(
                f"--zero-points={zero_points}: goes with a QA-LoRA adapter, and {path} is {reader.takes}; "
                "leave the option out"
            )
        reader.zero_points = zero_points
    with registered.guarded():
        checkpoint = reader.read(path, model, out, ranks=ranks)
    if registered.provider and not isinstance(checkpoint, Checkpoint):
        raise registered.failure(f"read {path} and returned a {type(checkpoint).__name__}, not a Checkpoint")
    check_group_sizes(checkpoint.manifest.layers, str(path))
    return checkpoint


def base_model(path: Path, model: ModelSpec | None) -> ModelSpec:
    """The base model of a checkpoint: the one that the user gives, or the checkpoint itself where it is a model.

    Raises:
        ArtifactError, PlugInError: as read_checkpoint.
        RecipeError: none is given and one is needed, or another one than the checkpoint.
    """
    reader = _reader_of(path).thing()
    if not reader.is_model:
        if model is None:
            raise RecipeError(
                f"--model: missing; {path} is {reader.takes}, so give the base model that it was tuned on"
            )
        return model
    if model is not None and Path(model.id).resolve() != path.resolve():
        raise RecipeError(f"--model: {path} is {reader.takes}, a model of its own; leave --model out")
    return model or ModelSpec(id=str(path))


def _reader_of(path: Path) -> Registered[type[CheckpointReader]]:
    if not path.exists():
        raise ArtifactError(f"{path}: no such file or folder; give a checkpoint")
    kinds = []
    for registered in readers.all():
        with registered.guarded():
            reader = registered.thing()
            if reader.recognizes(path):
                return registered
            kinds.append(reader.takes)
    raise ArtifactError(f"{path}: not a checkpoint that a reader recognizes; give {', or '.join(kinds)}")
