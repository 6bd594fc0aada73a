"""Stage adopt: checkpoints, whoever tuned them, become checkpoints of ours."""

from ovexport.readers.nncf import NncfReader, adopt
from ovexport.readers.own import OwnReader
from ovexport.readers.packed import PackedReader
from ovexport.readers.peft import PeftReader
from ovexport.readers.qalora import QaLoraReader
from ovexport.readers.reader import BaseWeights, CheckpointReader, ZeroPoints, base_model, read_checkpoint, readers

__all__ = [
    "BaseWeights",
    "CheckpointReader",
    "NncfReader",
    "OwnReader",
    "PackedReader",
    "PeftReader",
    "QaLoraReader",
    "ZeroPoints",
    "adopt",
    "base_model",
    "read_checkpoint",
    "readers",
]
