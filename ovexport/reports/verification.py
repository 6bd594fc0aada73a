"""verification.json."""

import builtins
from typing import Annotated, Any, Literal

from pydantic import Field, computed_field, model_validator

from ovexport.reports.figures import Meaning
from ovexport.storage.records import Record


class Check(Record):
    """One check of the proof.

    Attributes:
        name: what is checked.
        subject: the layer, tensor or file it is checked on; "model" for all of them.
        value, limit: what was found and what it had to be.
        detail: what a failure means, or where the first difference is.
    """

    name: str
    subject: str
    value: Any
    limit: Any
    passed: bool
    detail: str = ""


class LayerRow(Record):
    """A weight matrix as the IR holds it.

    Attributes:
        group_size: entries that share a scale; 0 without scales.
        weight_error, twin_weight_error: the Frobenius norm of the unpacked matrix less the base model's, over the
            latter's; of the IR and of its untuned twin, where they were given.
        note: what is not packed to 4 bits, and what that costs; None where there is nothing to say.
    """

    name: str
    kind: Literal["linear", "embedding"]
    element_type: str
    shape: tuple[int, ...]
    group_size: int
    weight_bytes: int
    bits_per_weight: float
    weight_error: float | None = None
    twin_weight_error: float | None = None
    note: str | None = None


class VerificationSummary(Record):
    """The counts of the proof; None where no checkpoint, twin or runtime was there to compare with."""

    linear_layers: Annotated[int, Meaning("Linear layers in the graph")]
    packed_int4: Annotated[int, Meaning("Linear layers whose weights are 4-bit codes", "higher")]
    packed_int8: Annotated[int, Meaning("Linear layers whose weights are 8-bit codes")]
    float: Annotated[int, Meaning("Linear layers whose weights are in floating point", "lower")]
    code_mismatches: Annotated[int | None, Meaning("codes that differ from a second computation", "lower")]
    scale_mismatches: Annotated[int | None, Meaning("scales that differ from a second computation", "lower")]
    zero_point_mismatches: Annotated[int | None, Meaning("zero points that differ from a second computation", "lower")]
    adapter_nodes: Annotated[int, Meaning("adapter operations that are left in the graph", "lower")]
    operators_beyond_twin: Annotated[int | None, Meaning("operations that the untuned twin does not have", "lower")]
    runtime_packed_linears: Annotated[
        int | None, Meaning("Linear layers that the compiled model computes from packed weights", "higher")
    ]
    weight_bytes: Annotated[int, Meaning("codes, scales and zero points of every weight matrix", "lower")]
    predicted_weight_bytes: Annotated[int | None, Meaning("what the formats in the checkpoint add up to")]
    bits_per_weight: Annotated[
        "builtins.float | None", Meaning("bits of codes, scales and zero points for one weight", "lower")
    ]
    bytes_read_per_token: Annotated[int, Meaning("weights of every Linear layer, which each token reads", "lower")]
    reason: str | None = None


PROOF_VERDICTS = {
    "proven": "PROVEN",
    "partial": "PARTLY PROVEN",
    "described": "DESCRIBED, NOT PROVEN",
    "failed": "FAILED",
}
"""What a proof can come to, with the words for it on the page, the card, the terminal and the hub."""


class VerificationReport(Record):
    """verification.json.

    Attributes:
        notes: what a reader has to know beside the checks, such as runtime settings that the IR carries.
    """

    passed: Annotated[bool, Meaning("1 where every check of the proof passed, otherwise 0", "higher")]
    subject: str
    checks: tuple[Check, ...]
    summary: VerificationSummary
    layers: tuple[LayerRow, ...]
    files: dict[str, str] = Field(description="SHA-256 of each file of the IR")
    notes: tuple[str, ...] = ()
    versions: dict[str, str]

    @model_validator(mode="before")
    @classmethod
    def _verdict_is_computed(cls, values: Any) -> Any:
        """A verdict in a file says nothing beside the checks and what was not compared."""
        return {key: value for key, value in values.items() if key != "verdict"} if isinstance(values, dict) else values

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Literal["proven", "partial", "described", "failed"]:
        """ "partial" where something was not there to compare with, or was not looked at (`summary.reason` says what);
        "described" without a checkpoint."""
        if not self.passed:
            return "failed"
        if self.summary.predicted_weight_bytes is None:
            return "described"
        return "proven" if self.summary.reason is None else "partial"

    @property
    def heading(self) -> str:
        """The verdict in words."""
        return PROOF_VERDICTS[self.verdict]

    @property
    def told(self) -> str:
        """The verdict, how many checks passed, the notes, and what was not looked at."""
        passed = sum(check.passed for check in self.checks)
        missing = [f"not checked: {self.summary.reason}"] if self.summary.reason else []
        return "; ".join([f"{self.heading}: {passed:,} of {len(self.checks):,} checks passed", *self.notes, *missing])
