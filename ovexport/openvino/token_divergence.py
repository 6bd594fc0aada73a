"""What a token's two distributions have in common, out of their logits.

The sums over the vocabulary run in the OpenVINO runtime, with all its threads, in float32 over a few entries each, and
are put together in float64: fast beside a forward pass, and exact to what float32 logits allow.
"""

from dataclasses import dataclass

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray

from ovexport.errors import UnsupportedModelError

Floats = NDArray[np.float64]
_SUMMED_AT_ONCE = 64
_ENTRIES_AT_ONCE = 1 << 21


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStatistics:
    """Figures of scored tokens, each (rows, length).

    Attributes:
        nll, reference_nll: -log p of the true token, in nats.
        kl: KL(reference ‖ candidate) in nats, not negative but for rounding.
        same_top1: whether the likeliest token is the same.
        probability_change: of the true token, the candidate's less the reference's.
    """

    nll: Floats
    reference_nll: Floats
    kl: Floats
    same_top1: NDArray[np.bool_]
    probability_change: Floats


class Comparator:
    """Compares logits over a vocabulary of a given size."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        self._request = ov.Core().compile_model(_graph(vocabulary), "CPU", settings).create_infer_request()

    def __call__(
        self, reference: NDArray[np.float32], candidate: NDArray[np.float32], true: NDArray[np.integer]
    ) -> TokenStatistics:
        """Compare two models' logits.

        Args:
            reference, candidate: logits, (rows, length, vocabulary), float32.
            true: the tokens that came next, (rows, length).

        Raises:
            ValueError: the shapes do not fit each other or the vocabulary.
            UnsupportedModelError: a logit is infinite or not a number.

        Source: llama.cpp's `perplexity --kl-divergence`, which averages the same quantities. With e = exp(x - max x)
        and S = sum e, KL = sum(e_x (x' - y')) / S_x - log(S_x / S_y), x' and y' being the logits less their maxima:
        sums of small terms and a logarithm near 0, where no large numbers cancel.
        """
        if reference.shape != candidate.shape or reference.shape != (*true.shape, self.vocabulary):
            raise ValueError(f"shapes differ: {reference.shape}, {candidate.shape}, tokens {true.shape}")
        rows = [logits.reshape(-1, self.vocabulary) for logits in (reference, candidate)]
        tokens = true.reshape(-1, 1).astype(np.int32)
        step = max(1, _ENTRIES_AT_ONCE // self.vocabulary)
        blocks = [slice(begin, begin + step) for begin in range(0, len(tokens), step)]
        sums = [self._sums(rows[0][block], rows[1][block], tokens[block]) for block in blocks]
        weighted, totals, true_logits, likeliest = (np.concatenate(parts, axis=-1) for parts in zip(*sums, strict=True))
        with np.errstate(all="ignore"):
            reference_own, own = true_logits - np.log(totals)
            kl = weighted / totals[0] - np.log(totals[0] / totals[1])
        if not np.isfinite(kl).all():
            raise UnsupportedModelError("a logit is infinite or not a number; the IR is broken, or overflows")
        shape = true.shape
        return TokenStatistics(
            nll=-own.reshape(shape),
            reference_nll=-reference_own.reshape(shape),
            kl=kl.reshape(shape),
            same_top1=(likeliest[0] == likeliest[1]).reshape(shape),
            probability_change=(np.exp(own) - np.exp(reference_own)).reshape(shape),
        )

    def _sums(
        self, reference: NDArray[np.float32], candidate: NDArray[np.float32], true: NDArray[np.int32]
    ) -> tuple[Floats, Floats, NDArray[np.float32], NDArray[np.int32]]:
        """Of some tokens: sum of e_x (x' - y'), (tokens,); of reference and candidate, (2, tokens) each, sum of e, the
        true token's logit less the maximum, and the likeliest token."""
        self._request.infer([reference, candidate, true], share_inputs=True)
        outputs = [np.array(self._request.get_output_tensor(index).data) for index in range(7)]
        weighted, *of_models = outputs
        sums, true_logits, likeliest = (of_models[index::3] for index in range(3))
        return (
            weighted.sum(axis=1, dtype=np.float64),
            np.stack([parts.sum(axis=1, dtype=np.float64) for parts in sums]),
            np.stack([values[:, 0] for values in true_logits]),
            np.stack([values[:, 0] for values in likeliest]),
        )


def _graph(vocabulary: int) -> ov.Model:
    """Inputs: logits (tokens, vocabulary) of reference and candidate, true tokens (tokens, 1). Outputs: partial sums of
    e_x (x' - y'); then of each model partial sums of e, the true token's logit less the maximum, and the likeliest
    token."""
    logits = [ops.parameter([-1, vocabulary], np.float32) for _ in range(2)]
    true = ops.parameter([-1, 1], np.int32)
    last = ops.constant(np.array([1], np.int64))
    shifted = [ops.subtract(one, ops.reduce_max(one, last, keep_dims=True)) for one in logits]
    powers = [ops.exp(one) for one in shifted]
    outputs = [_partial_sums(ops.multiply(powers[0], ops.subtract(*shifted)), vocabulary)]
    for one, less, power in zip(logits, shifted, powers, strict=True):
        likeliest = ops.topk(one, ops.constant(1, np.int64), 1, "max", "value").output(1)
        outputs += [_partial_sums(power, vocabulary), ops.gather_elements(less, true, 1).output(0), likeliest]
    return ov.Model(outputs, [*logits, true])


def _partial_sums(terms: ov.Node, vocabulary: int) -> ov.Output:
    """Sums over _SUMMED_AT_ONCE neighbours, and one over the rest."""
    even = vocabulary // _SUMMED_AT_ONCE * _SUMMED_AT_ONCE

    def part(begin: int, end: int, width: int) -> ov.Node:
        bounds = [np.array([value], np.int64) for value in (begin, end, 1, 1)]
        folded = ops.reshape(ops.slice(terms, *bounds), np.array([0, -1, width], np.int64), special_zero=True)
        return ops.reduce_sum(folded, ops.constant(np.array([2], np.int64)), keep_dims=False)

    parts = [part(0, even, _SUMMED_AT_ONCE)] if even else []
    parts += [part(even, vocabulary, vocabulary - even)] if even < vocabulary else []
    return ops.concat(parts, 1).output(0)
