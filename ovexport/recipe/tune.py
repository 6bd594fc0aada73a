"""Sections [tune] and [search]."""

import math
from typing import Literal, Self

from pydantic import model_validator

from ovexport.recipe.spec import Fraction, NotNegative, NotNegativeReal, Positive, PositiveReal, Share, Spec

OBJECTIVES = ("distillation", "task")
"""Those of ovexport's own; a plug-in adds others."""
_KEYS_OF_ANOTHER_OBJECTIVE = {
    "task": ("temperature", "reverse_kl_share", "cross_entropy_share", "teacher_cache_gb"),
    "distillation": ("loss_on",),
}


class TuneSpec(Spec):
    """How adapters and scales are tuned.

    Attributes:
        objective: "distillation" learns the uncompressed model's distribution on text; "task" learns the examples of
            the recipe's task; a plug-in's objective has the name of its entry point.
        loss_on: with objective = "task": learn everything in an example, or the answer only.
        steps: optimizer steps; 0 keeps the starting point. Give either steps or epochs.
        epochs: passes over the training sequences or examples.
        batch_size: sequences per microbatch.
        gradient_accumulation_steps: microbatches per optimizer step.
        learning_rate: learning rate of the adapters.
        scale_learning_rate: learning rate of the scales; without it, a tenth of `learning_rate`.
        zero_point_learning_rate: learning rate of the zero points, in units of one quantization step; 0 leaves them
            where they are.
        norms: tune the weights and biases of the normalization layers too. The IR holds them in place of the base
            model's, so they cost nothing at inference.
        norm_learning_rate: learning rate of the norms.
        probe_learning_rates: try each of these for `probe_steps` steps first; the one with the smallest validation
            loss takes the place of `learning_rate`.
        probe_steps: optimizer steps of each try.
        weight_decay: AdamW's weight decay of the adapters.
        schedule: how the learning rates fall after the warm-up.
        warmup_fraction: share of the steps over which the learning rates rise from 0.
        adapter_dropout: share of the inputs that adapters do not see in a training step, drawn anew for each token
            (PEFT's `lora_dropout`); not with compress.method = "fq_lora", whose adapters are part of the weights.
        max_gradient_norm: a gradient with a larger norm is scaled down to this norm.
        temperature: temperature of both distributions in the distillation.
        reverse_kl_share: share of KL(compressed ‖ uncompressed) in the divergence; the rest is
            KL(uncompressed ‖ compressed).
        cross_entropy_share: share of the next token's cross-entropy in the loss; the rest is the divergence.
        ema_decay: decay of a moving average of the parameters, which is validated and kept in their place; 0 for none.
        patience: stop after this many validations in a row without a better one; without it, never stop early.
        most_skipped_steps: a step whose loss or gradient is not finite is skipped; more than this many in a row end the
            tuning with exit code 6.
        validate_every: optimizer steps between two validations.
        save_every: optimizer steps between two saves; `--resume` goes on from the last save.
        seed: seed of the order of the sequences, of the adapters' start and of the ranks that are drawn.
        device: where to tune; "auto" takes the GPU if there is one.
        precision: precision of matrix products in both models; "auto" is bf16 if the device has instructions for it.
            Quantization is always in float32.
        gradient_checkpointing: compute activations again in the backward pass: less memory, more time.
        teacher_cache_gb: the most disk space for the uncompressed model's hidden states, in the folder that the
            environment variable OVEXPORT_CACHE names (~/.cache/ovexport without it). If they do not fit, that model
            runs at every step.
    """

    objective: str = "distillation"
    loss_on: Literal["answer", "everything"] = "everything"
    steps: NotNegative | None = None
    epochs: Positive | None = None
    batch_size: Positive = 4
    gradient_accumulation_steps: Positive = 2
    learning_rate: PositiveReal = 1e-4
    scale_learning_rate: NotNegativeReal | None = None
    zero_point_learning_rate: NotNegativeReal = 0.0
    norms: bool = False
    norm_learning_rate: PositiveReal = 1e-4
    probe_learning_rates: tuple[PositiveReal, ...] = ()
    probe_steps: Positive = 50
    weight_decay: NotNegativeReal = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Fraction = 0.05
    adapter_dropout: Fraction = 0.0
    max_gradient_norm: PositiveReal = 1.0
    temperature: PositiveReal = 1.0
    reverse_kl_share: Share = 0.0
    cross_entropy_share: Share = 0.0
    ema_decay: Fraction = 0.0
    patience: Positive | None = None
    most_skipped_steps: NotNegative = 10
    validate_every: Positive = 50
    save_every: Positive = 50
    seed: NotNegative = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    teacher_cache_gb: NotNegativeReal = 20.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        others = _KEYS_OF_ANOTHER_OBJECTIVE.get(self.objective, ())
        given = [name for name in others if getattr(self, name) != type(self).model_fields[name].default]
        if given:
            raise ValueError(f"{', '.join(given)}: not of objective = {self.objective!r}; leave it out")
        if not self.norms and self.norm_learning_rate != type(self).model_fields["norm_learning_rate"].default:
            raise ValueError("norm_learning_rate goes with norms = true; leave it out")
        return self

    def learning_rate_factor(self, step: int, steps: int) -> float:
        """Warm-up and schedule: what the learning rates are multiplied with at a step of so many, 0 to 1."""
        warmup = round(self.warmup_fraction * steps)
        if step < warmup:
            return (step + 1) / warmup
        left = max(0.0, (steps - step) / max(1, steps - warmup))
        return {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[self.schedule]


class SearchSpec(Spec):
    """How the ranks of FQ_LORA_NLS adapters are chosen, after tuning, on the task's validation split.

    Attributes:
        method: "heuristics" tries the median ranks, the most frequent, the largest and the smallest ones, and the five
            configurations with the smallest loss in tuning; "evolution" goes on from the best of them.
        evaluations: configurations that are scored on the sample, heuristics included.
        sample: validation examples that score a configuration; the same ones for all.
        finalists: the best configurations of the sample, which are scored on the whole validation split; the best of
            them is chosen.
        ranks: take these ranks and do not search: one rank for all, or one per block or Linear.
        seed: seed of the sample and of the evolution.
    """

    method: Literal["evolution", "heuristics"] = "evolution"
    evaluations: Positive = 64
    sample: Positive = 128
    finalists: Positive = 4
    ranks: tuple[Positive, ...] | None = None
    seed: NotNegative = 0
