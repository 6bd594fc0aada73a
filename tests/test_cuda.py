"""What tunes runs on a GPU, and what it leaves is proven like anything else. Skipped where there is none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, tiny_values
from test_search import nls_recipe  # noqa: F401 (a fixture)

from ovexport import recipe
from ovexport.artifacts import Checkpoint, RunFolder
from ovexport.errors import OutOfMemory
from ovexport.models.device import Compute
from ovexport.pipeline import services
from ovexport.progress import silent
from ovexport.recipe import Recipe
from ovexport.reports import SearchReport, VerificationReport
from ovexport.storage.records import read_record
from ovexport.tune.trainer import Trainer, make_trainer
from ovexport.weights.adapters import make_quantizer
from ovexport.weights.layer import LayerFormat

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

FQ_LORA = {"group_size": 32, "rank": 8, "rounding": "nearest"}
QALORA = {"group_size": 16, "rank": 4, "method": "qalora", "mode": "int4_asym_f16zp", "rounding": "nearest"}


def on_gpu(model: Path, *, compress: dict | None = None, **tune: object) -> Recipe:
    values = tiny_values(model)
    values["compress"] = compress or FQ_LORA
    values["tune"] |= {"device": "cuda", "steps": 20, "validate_every": 10, "learning_rate": 2e-3} | tune
    return recipe.parse(values, base=REPOSITORY, origin="cuda")


def proof(run: RunFolder) -> VerificationReport:
    return read_record(run.path / "verification.json", VerificationReport)


def tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: np.array(checkpoint.adapters[name]) for name in checkpoint.adapters}


@pytest.mark.run
def test_two_sided_rounding_on_a_gpu_gives_nearly_the_codes_of_the_cpu(tiny_model: Path, tmp_path: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        parsed = on_gpu(tiny_model, compress={"group_size": 32, "rank": 8, "device": device})
        run = services.run(parsed, tmp_path / device, until="compress")
        weights = run.compressed.weights
        found.append(np.concatenate([np.asarray(weights[name]).ravel() for name in sorted(weights)]))
    scale = np.abs(found[0]).mean()
    assert np.mean(np.abs(found[0] - found[1]) > 1e-3 * scale) < 0.02  # sums in another order: some ties fall otherwise


@pytest.mark.run
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("compress", [FQ_LORA, FQ_LORA | {"mode": "int4_sym"}, QALORA], ids=["asym", "sym", "qalora"])
def test_what_was_tuned_on_a_gpu_is_proven(tiny_model: Path, tmp_path: Path, precision: str, compress: dict) -> None:
    parsed = on_gpu(tiny_model, compress=compress, precision=precision)
    run = services.run(parsed, tmp_path / "run", until="verify")
    report = proof(run)
    assert report.passed
    assert report.summary.code_mismatches == 0
    assert run.checkpoint.manifest.steps
    log = (run.logs / "tuning.jsonl").read_text().splitlines()
    assert len(log) >= 20


@pytest.mark.run
@pytest.mark.parametrize(
    ("compress", "tune"),
    [(FQ_LORA, {"ema_decay": 0.9}), (QALORA, {"adapter_dropout": 0.2, "gradient_checkpointing": True})],
    ids=["averages", "dropout and checkpointing"],
)
def test_an_interrupted_tuning_on_a_gpu_goes_on_to_the_same_adapters(
    tiny_model: Path, tmp_path: Path, compress: dict, tune: dict
) -> None:
    parsed = on_gpu(tiny_model, compress=compress, steps=6, save_every=1, validate_every=3, **tune)
    whole = services.run(parsed, tmp_path / "whole", until="tune").tuned

    def stop(progress: object) -> None:
        if getattr(progress, "task", "") == "tune" and getattr(progress, "done", 0) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        services.run(parsed, tmp_path / "killed", until="tune", listener=stop)
    resumed = services.run(parsed, tmp_path / "killed", until="tune", resume=True).tuned
    expected, found = tensors(whole), tensors(resumed)
    assert {name: float(np.abs(values - found[name]).max()) for name, values in expected.items()} == dict.fromkeys(
        expected, 0.0
    )


def stepped(run: RunFolder, parsed: Recipe, device: str) -> tuple[Trainer, float]:
    compute = Compute(torch.device(device), torch.float32)
    trainer = make_trainer(run.compressed, parsed.model, parsed.tune, run.data, compute, silent)
    return trainer, trainer.step(0).loss_nats


@pytest.mark.run
def test_a_step_in_float32_is_the_same_on_both_devices(tiny_model: Path, tmp_path: Path) -> None:
    parsed = on_gpu(tiny_model, precision="fp32")
    run = services.run(parsed, tmp_path / "run", until="compress")
    (ours, our_loss), (theirs, their_loss) = (stepped(run, parsed, device) for device in ("cuda", "cpu"))
    assert our_loss == pytest.approx(their_loss, rel=1e-4)
    apart = [
        float((value.detach().cpu() - theirs.student.trained[name].detach()).abs().mean())
        for name, value in ours.student.trained.items()
        if name.endswith("lora_B")
    ]
    assert max(apart) < 0.05 * parsed.tune.learning_rate  # the first step of AdamW is the learning rate, with a sign


@pytest.mark.run
def test_ranks_are_searched_on_a_gpu(nls_recipe: Recipe, tmp_path: Path) -> None:  # noqa: F811
    tune = nls_recipe.tune.model_copy(update={"device": "cuda"})
    run = services.run(nls_recipe.model_copy(update={"tune": tune}), tmp_path / "run", until="verify")
    assert read_record(run.search, SearchReport).scores
    assert proof(run).passed


@pytest.mark.parametrize(
    ("mode", "adapter"),
    [
        ("int4_asym", "lora"),
        ("int4_sym", "lora"),
        ("int8_asym", "lora"),
        ("int4_asym", "qalora"),
        ("int4_asym_f16zp", "qalora"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_same_on_both_devices(mode: str, adapter: str, dtype: torch.dtype) -> None:
    rank = 0 if mode.startswith("int8") else 16
    layer = LayerFormat(
        name="w",
        kind="linear",
        mode=mode,
        out_features=512,
        in_features=1024,
        group_size=64,
        rank=rank,
        adapter=adapter,
        adapter_factor=0.3,
    )
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(512, 1024, generator=generator) * 0.05).to(dtype)
    quantizer = make_quantizer(layer)
    quantizer.initialize(weight, generator)
    with torch.no_grad():
        for name, value in quantizer.named_parameters():
            if name == "lora_B":
                value.copy_(torch.randn(value.shape, generator=generator) * 0.02)
    here = quantizer.quantize(weight).digest()
    assert quantizer.cuda().quantize(weight.cuda()).digest() == here


@pytest.mark.run
def test_peak_memory_is_the_gpus(tiny_model: Path, tmp_path: Path) -> None:
    parsed = on_gpu(tiny_model)
    run = services.run(parsed, tmp_path / "run", until="compress")
    torch.cuda.reset_peak_memory_stats()
    compute = Compute.of("cuda", "bf16")
    trainer = make_trainer(run.compressed, parsed.model, parsed.tune, run.data, compute, silent)
    trainer.step(0)
    peak = compute.peak_memory_bytes()
    assert peak is not None
    assert 0 < peak < 10**9  # a process that has loaded torch and CUDA holds more of the machine's memory


@pytest.mark.run
def test_a_gpu_that_is_too_small_is_one_clear_line(tiny_model: Path, tmp_path: Path) -> None:
    parsed = on_gpu(tiny_model)
    services.run(parsed, tmp_path / "run", until="compress")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
    try:
        with pytest.raises(OutOfMemory, match="out of memory on the device") as error:
            services.run(parsed, tmp_path / "run", until="tune", resume=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "\n" not in str(error.value)
