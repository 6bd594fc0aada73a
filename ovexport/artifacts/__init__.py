"""What stages leave on disk, a module per folder."""

from ovexport.artifacts.checkpoint import DRAWN_RANKS, Checkpoint, CheckpointManifest, DrawnRanks, DrawnStep, Validation
from ovexport.artifacts.data import DataManifest, Example, PreparedData
from ovexport.artifacts.ir import IR, IR_MANIFEST, IndexedConstant, IRManifest, WeightIndex
from ovexport.artifacts.packed import PackedManifest, PackedWeights
from ovexport.artifacts.peft_adapter import ADAPTER_FOLDER, AdaptedLayer, PeftAdapter, is_peft_adapter, is_qalora
from ovexport.artifacts.run import FORMAT_VERSION, MODELS, RUN_FILES, RunFolder, StageRecord

__all__ = [
    "ADAPTER_FOLDER",
    "DRAWN_RANKS",
    "FORMAT_VERSION",
    "IR",
    "IR_MANIFEST",
    "MODELS",
    "RUN_FILES",
    "AdaptedLayer",
    "Checkpoint",
    "CheckpointManifest",
    "DataManifest",
    "DrawnRanks",
    "DrawnStep",
    "Example",
    "IRManifest",
    "IndexedConstant",
    "PackedManifest",
    "PackedWeights",
    "PeftAdapter",
    "PreparedData",
    "RunFolder",
    "StageRecord",
    "Validation",
    "WeightIndex",
    "is_peft_adapter",
    "is_qalora",
]
