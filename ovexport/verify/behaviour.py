"""Second line of evidence: does the IR say what the tuned model said?

At the end of tuning the model's logits of held-out text were recorded in float32. The IR computes them again with
float32 arithmetic, float32 KV cache and no dynamic quantization; what is left between the two is the rounding of sums
that are taken in another order.

How much that may be: a dot product of K terms in float32 carries a relative error of about u·sqrt(K), u = 2^-24, when
rounding errors are independent (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 2.8). Errors of
the layers add up in quadrature, to u·sqrt(sum of K over all matrices that a token passes). `MARGIN` allows for what
this leaves out: the largest of many thousand logits, amplification by norms and softmax, the runtime's approximations
of exp and tanh.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovexport.errors import ArtifactError
from ovexport.openvino.graph import Weight
from ovexport.openvino.runtime import LogitsRunner
from ovexport.reports import Check
from ovexport.storage.tensorfile import TensorFile
from ovexport.verify.checks import equal, zero

UNIT_ROUNDOFF = 2.0**-24
MARGIN = 8.0


def behaviour(run: LogitsRunner, name: str, limit: float, reference: TensorFile) -> list[Check]:
    """Largest relative error of the logits, and positions at which another token is the likeliest.

    Args:
        run: the product.
        name: of it, for messages.
        limit: the largest relative error that rounding explains.
        reference: `token_ids` (sequences, length) and `logits` (sequences, length, vocabulary).

    Raises:
        ArtifactError: the reference is not of such a model.
        UnsupportedModelError: the IR can't be run.
    """
    tokens, expected = _checked(reference)
    worst, elsewhere, first = 0.0, 0, ""
    for index, row in enumerate(tokens):
        try:
            logits = run(row[None].astype(np.int64))[0]
        except RuntimeError as error:
            return [_not_run(error)]
        _require_same_shape(name, logits, expected[index])
        errors = relative_errors(logits, expected[index])
        worst = float(max(worst, np.max(errors)))
        wrong = np.flatnonzero(_another_likeliest(logits, expected[index], limit))
        if len(wrong) and not elsewhere:
            first = f"first at sequence {index}, position {int(wrong[0])}"
        elsewhere += len(wrong)
    return [
        Check(
            name="logits as the checkpoint's",
            subject="largest relative error",
            value=worst,
            limit=limit,
            passed=bool(worst <= limit),
            detail="" if worst <= limit else "more than float32 rounding can explain",
        ),
        zero("likeliest token as the checkpoint's", f"{tokens.size} positions", elsewhere, first),
    ]


def _require_same_shape(name: str, logits: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    if logits.shape != expected.shape:
        raise ArtifactError(
            f"{name}: gives logits of shape {logits.shape} where the checkpoint's reference has {expected.shape}; give "
            "the checkpoint that it was made from"
        )


def _checked(reference: TensorFile) -> tuple[NDArray[np.integer[Any]], NDArray[np.float32]]:
    """Token ids and logits.

    Raises:
        ArtifactError: they are no such reference.
    """
    tokens, logits = reference.require("token_ids"), reference.require("logits")
    sound = tokens.ndim == 2 and tokens.size > 0 and tokens.dtype.kind == "i" and logits.dtype == np.float32
    if not sound or logits.ndim != 3 or logits.shape[:2] != tokens.shape or logits.shape[2] == 0:
        raise ArtifactError(
            f"reference.safetensors: token_ids {tokens.dtype} {tokens.shape} and logits {logits.dtype} {logits.shape} "
            "are no reference; tune again"
        )
    return tokens, logits


def _not_run(error: RuntimeError) -> Check:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = lines[-1] if lines else "the runtime gives no reason"
    return equal("logits as the checkpoint's", "the model runs", False, True, detail)


def rounding_limit(graph_weights: tuple[Weight, ...]) -> float:
    """The largest relative error that float32 rounding explains."""
    terms = sum(weight.in_features for weight in graph_weights if weight.layer_kind == "linear")
    return MARGIN * UNIT_ROUNDOFF * math.sqrt(terms)


def relative_errors(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float64]:
    """Per position, the largest difference of a logit over the range of the expected logits; infinite where not finite.

    Args:
        actual, expected: (positions, vocabulary).
    """
    spread = np.ptp(expected.astype(np.float64), axis=-1)
    difference = np.abs(actual.astype(np.float64) - expected).max(axis=-1)
    errors: NDArray[np.float64] = np.where(spread > 0, difference / np.where(spread > 0, spread, 1), difference)
    return np.where(np.isfinite(errors), errors, np.inf)


def _another_likeliest(actual: NDArray[np.float32], expected: NDArray[np.float32], limit: float) -> NDArray[np.bool_]:
    """Where the expected likeliest token is not it, by more than rounding moves two logits that are nearly equal."""
    top = expected.argmax(axis=-1)
    chosen = np.take_along_axis(actual, top[:, None], axis=-1)[:, 0]
    shortfall: NDArray[np.float32] = actual.max(axis=-1) - chosen
    elsewhere: NDArray[np.bool_] = ~(shortfall <= 2 * limit * np.ptp(expected, axis=-1))
    return elsewhere
