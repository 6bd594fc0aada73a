"""Random models in the shapes of real ones, for benchmarks of time and memory, which do not depend on values."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ovexport.artifacts import Checkpoint, PreparedData, RunFolder
from ovexport.compress import compress
from ovexport.convert import convert
from ovexport.models.loading import load_model
from ovexport.models.matrix_view import matrix_view
from ovexport.recipe import CompressSpec, ConvertSpec, ModelSpec
from ovexport.storage.files import atomic_folder
from ovexport.storage.records import write_record
from ovexport.storage.tensorfile import write_tensors
from ovexport.strip import strip
from ovexport.trace.stage import trace
from ovexport.weights.adapters import load_quantizer

REPOSITORY = Path(__file__).parent.parent
TOKENIZER = REPOSITORY / "models" / "storyteller-4m"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama's sizes."""

    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate_size: int
    vocabulary: int


M360 = Shape(
    hidden_size=960, layers=32, heads=15, key_value_heads=5, intermediate_size=2560, vocabulary=49152
)  # SmolLM2-360M's
TINY = Shape(hidden_size=64, layers=2, heads=4, key_value_heads=2, intermediate_size=128, vocabulary=2048)
M30 = Shape(hidden_size=512, layers=8, heads=8, key_value_heads=4, intermediate_size=1408, vocabulary=8192)

M33 = Shape(hidden_size=512, layers=10, heads=8, key_value_heads=4, intermediate_size=1408, vocabulary=8192)
M135 = Shape(
    hidden_size=576, layers=30, heads=9, key_value_heads=3, intermediate_size=1536, vocabulary=49152
)  # SmolLM2-135M's
M1700 = Shape(
    hidden_size=2048, layers=24, heads=32, key_value_heads=32, intermediate_size=8192, vocabulary=49152
)  # SmolLM2-1.7B's


def save_random_llama(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """A Llama with random BF16 weights and tied embeddings, norms included, with the bundled tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / name, folder / name)
    return folder


def moved(start: Checkpoint, model: ModelSpec, out: Path, active_rank: int | None = None) -> Checkpoint:
    """A starting point with every adapter moved at random, as tuning would leave it: other codes, the same shapes."""
    manifest = start.manifest
    layers = tuple(
        layer.model_copy(update={"active_rank": active_rank if layer.rank else None}) for layer in manifest.layers
    )
    manifest = manifest.model_copy(update={"layers": layers})
    network = load_model(model)
    adapters = start.adapters
    generator = np.random.default_rng(0)
    with atomic_folder(out) as folder:
        tensors = {name: np.array(adapters[name]) for name in adapters}
        for name, value in tensors.items():
            if name.endswith(".lora_B"):
                value[...] = generator.normal(scale=2e-3, size=value.shape)
        write_tensors(tensors, folder / "adapters.safetensors")
        write_record(manifest, folder / "checkpoint.json")
        written = Checkpoint(folder).adapters
        digests = {
            layer.name: load_quantizer(layer, written).quantize(matrix_view(network, layer.name).read()).digest()
            for layer in manifest.packed
        }
        write_record(manifest.model_copy(update={"digests": digests, "steps": 1}), folder / "checkpoint.json")
    return Checkpoint(out)


def build_run(folder: Path, shape: Shape, spec: CompressSpec) -> RunFolder:
    """BF16 IR, plain twin and product of a random model, its adapters moved at random instead of tuned."""
    return convert_moved(ModelSpec(id=str(save_random_llama(folder / "model", shape))), folder, spec)


def convert_moved(model: ModelSpec, folder: Path, spec: CompressSpec, active_rank: int | None = None) -> RunFolder:
    """BF16 IR, plain twin and product of a model, its adapters moved at random instead of tuned."""
    run = RunFolder(folder / "run")
    trace(model, ConvertSpec(), run.ir("bf16").path)
    compress(model, spec, PreparedData(folder), 0, run.compressed.path)
    moved(run.compressed, model, run.checkpoint.path, active_rank)
    for name, checkpoint in (("plain", run.compressed), ("int4", run.checkpoint)):
        packed = strip(checkpoint, run.ir("bf16"), run.packed(name).path)
        convert(run.ir("bf16"), packed, run.ir(name).path)
    return run
