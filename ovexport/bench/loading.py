"""How a model is loaded and run: the same for the timed runs, for the one that measures memory, and for the proof that
a runtime adapter is applied."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov
import openvino_genai
from numpy.typing import NDArray

from ovexport.artifacts import IR
from ovexport.errors import UnsupportedModelError
from ovexport.openvino.genai import told
from ovexport.openvino.runtime import ACCURATE
from ovexport.recipe import Backend, BenchSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeAdapter:
    """A LoRA adapter that openvino-genai adds while the model runs; the packed weights stay the untuned ones.

    Attributes:
        path: safetensors with PEFT's names, as `ovexport.bench.save_adapter` writes them.
        mode: "dynamic", where adapters can be exchanged between two calls, or "static", where they are constants of
            the compiled graph. openvino-genai's MODE_FUSE adds them to the weights as it loads, and throws on packed
            ones.
        scale: what B·A is multiplied by; openvino-genai calls it alpha.
    """

    path: Path
    mode: Literal["dynamic", "static"]
    scale: float = 1.0


def load_pipeline(
    ir: IR, spec: BenchSpec, backend: Backend, adapter: RuntimeAdapter | None = None, *, accurate: bool = False
) -> openvino_genai.LLMPipeline:
    """The IR under the benchmark's settings, with a runtime adapter where one is given.

    Args:
        backend: of attention.
        accurate: with nothing but the weights approximate, whatever precision the benchmark asks for.

    Raises:
        ArtifactError: the IR is missing.
        UnsupportedModelError: openvino-genai can't load the IR or the adapter.
    """
    folder = ir.require().path
    try:
        settings = (
            device_settings(spec) | backend_settings(backend) | ({"adapters": _config(adapter)} if adapter else {})
        )
        if accurate:
            settings |= ACCURATE
        return openvino_genai.LLMPipeline(str(folder), spec.device, **settings)
    except RuntimeError as error:
        what = f"{ir.path} with the adapter {adapter.path}" if adapter else str(ir.path)
        raise UnsupportedModelError(f"{what}: openvino-genai can't load it ({told(error)})") from error


def device_settings(spec: BenchSpec) -> dict[str, Any]:
    """What the benchmark pins of the device's settings."""
    pinned = {
        "INFERENCE_PRECISION_HINT": spec.inference_precision,
        "KV_CACHE_PRECISION": spec.kv_cache_precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": spec.dynamic_quantization_group_size,
        "INFERENCE_NUM_THREADS": spec.threads,
        "NUM_STREAMS": spec.streams,
    }
    return {name: value for name, value in pinned.items() if value not in (None, "default")}


def backend_settings(backend: Backend) -> dict[str, Any]:
    """An attention backend, without what it keeps of former prompts."""
    if backend == "SDPA":
        return {"ATTENTION_BACKEND": backend}
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = sys.maxsize
    return {"ATTENTION_BACKEND": backend, "scheduler_config": scheduler}


def generate(pipeline: openvino_genai.LLMPipeline, tokens: NDArray[np.int64], count: int, *, beams: int = 1) -> Any:
    """Exactly `count` new tokens without sampling, end-of-sequence ignored.

    Args:
        tokens: the prompts, (batch, length).
        beams: more than one searches beams; the scores of the result are then sums of log-probabilities.
    """
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = count
    config.min_new_tokens = count
    config.ignore_eos = True
    config.do_sample = False
    config.num_beams = beams
    inputs = openvino_genai.TokenizedInputs(ov.Tensor(tokens), ov.Tensor(np.ones_like(tokens)))
    return pipeline.generate(inputs, config)


def _config(adapter: RuntimeAdapter) -> openvino_genai.AdapterConfig:
    modes = openvino_genai.AdapterConfig.Mode
    mode = {"dynamic": modes.MODE_DYNAMIC, "static": modes.MODE_STATIC}[adapter.mode]
    return openvino_genai.AdapterConfig(openvino_genai.Adapter(str(adapter.path)), adapter.scale, mode)
