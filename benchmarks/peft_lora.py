"""LoRA on the uncompressed model with PEFT: what a task's tuning is compared with.

The data, the order of the examples, the loss, the schedule and the choice of the best step are those of our tuning; the
adapters, their initialisation and their merging are PEFT's.
"""

from pathlib import Path

import peft
import torch
from torch import nn

from ovexport.artifacts import PreparedData
from ovexport.models.architecture import Architecture, compute_in
from ovexport.models.device import Compute
from ovexport.models.head import Head
from ovexport.models.loading import load_model, load_tokenizer
from ovexport.objectives import Answers
from ovexport.recipe import ModelSpec, TuneSpec
from ovexport.tune.sampler import count_steps, draw_batches


def tuned_with_peft(model: ModelSpec, spec: TuneSpec, data: PreparedData, rank: int, out: Path) -> tuple[Path, float]:
    """A folder with the merged model, in the base model's type, and the mean -log p(token) of the validation answers.

    Args:
        spec: patience, averages and probes of learning rates, which it may ask for, are left out.
        rank: of every Linear layer's adapter; PEFT's factor alpha / rank is 1, as it is in FQ_LORA.
    """
    torch.manual_seed(spec.seed)
    base = load_model(model)
    stored = base.dtype
    matrices = Architecture(base).matrices()
    linear = [matrix.name.removesuffix(".weight") for matrix in matrices if matrix.kind == "linear"]
    compute = Compute.of("cpu", spec.precision)
    compute_in(base, compute.dtype)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=linear, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(base, config)
    network = wrapped.get_base_model()

    train = data.examples("train")
    objective = Answers(train, data.examples("validation"), spec, compute)
    head = Head.of(network)
    trained = {name: value for name, value in wrapped.named_parameters() if value.requires_grad}
    everything = range(objective.validation_examples)
    steps = count_steps(spec, len(train))
    optimizer = torch.optim.AdamW(trained.values(), lr=spec.learning_rate, weight_decay=spec.weight_decay)
    best, kept = (
        objective.score(network, head, everything),
        {name: value.detach().clone() for name, value in trained.items()},
    )
    for step, microbatches in enumerate(draw_batches(len(train), steps, spec).tolist()):
        optimizer.param_groups[0]["lr"] = spec.learning_rate * spec.learning_rate_factor(step, steps)
        weight = sum(map(objective.weight, microbatches))
        for indices in microbatches:
            objective.loss(network, head, indices, weight).backward()
        nn.utils.clip_grad_norm_(trained.values(), spec.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == steps or (step + 1) % spec.validate_every == 0:
            found = objective.score(network, head, everything)
            if found < best:
                best, kept = found, {name: value.detach().clone() for name, value in trained.items()}
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(kept[name])
    merged = wrapped.merge_and_unload().to(stored)
    merged.save_pretrained(out)
    load_tokenizer(model, merged.config.get_text_config().vocab_size).save_pretrained(out)
    return out, best
