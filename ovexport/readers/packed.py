"""Models whose weights are 4-bit codes already, in a format of ovexport.models.packed: the codes stay as they are."""

from collections.abc import Sequence
from pathlib import Path

from ovexport.artifacts import Checkpoint
from ovexport.errors import UnsupportedModelError
from ovexport.models.files import quantization_config
from ovexport.models.loading import open_packed
from ovexport.readers.reader import BaseWeights, CheckpointReader, readers
from ovexport.recipe import ModelSpec
from ovexport.weights.layer import LayerFormat, WeightMatrix
from ovexport.weights.policy import format_layer
from ovexport.weights.quantizer import FakeQuantizer


@readers.register("packed")
class PackedReader(CheckpointReader):
    """A model's folder with a `quantization_config` in its config.json."""

    takes = "a model in 4 bits (GPTQ, AWQ, AutoRound, compressed-tensors)"
    is_model = True

    def recognizes(self, path: Path) -> bool:
        """As CheckpointReader."""
        if not (path / "config.json").is_file():
            return False
        return quantization_config(ModelSpec(id=str(path))) is not None

    def read(self, path: Path, model: ModelSpec, out: Path, *, ranks: Sequence[int] | None) -> Checkpoint:
        """As CheckpointReader: the packed layers with the file's codes, all others in floating point."""
        base = BaseWeights.load(model)
        packed = open_packed(model)
        if packed is None:
            raise UnsupportedModelError(f"{path}: holds no 4-bit codes of a known format; give {self.takes}")
        layers = [_format(matrix) for matrix in packed.marked(base.matrices)]
        quantizers = {layer.name: FakeQuantizer(layer) for layer in layers if layer.encoding}
        for name, quantizer in quantizers.items():
            packed.grid(name).set_on(quantizer)
        checkpoint = base.write(out, layers, quantizers, {})
        packed.require_codes(checkpoint.manifest.layers, checkpoint.manifest.digests)
        return checkpoint


def _format(matrix: WeightMatrix) -> LayerFormat:
    own = matrix.own
    if own is None:
        return format_layer(matrix, "float")
    return format_layer(matrix, own.mode, group_size=own.group_size, note=own.note)
