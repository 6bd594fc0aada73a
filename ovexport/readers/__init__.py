"""Stage adopt: checkpoints, whoever tuned them, become checkpoints of ours."""

from ovexport.readers.nncf import NncfReader, adopt
from ovexport.readers.own import OwnReader
from ovexport.readers.peft import PeftReader
from ovexport.readers.reader import BaseWeights, CheckpointReader, read_checkpoint, readers

__all__ = [
    "BaseWeights",
    "CheckpointReader",
    "NncfReader",
    "OwnReader",
    "PeftReader",
    "adopt",
    "read_checkpoint",
    "readers",
]
