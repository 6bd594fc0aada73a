"""What `bench --search` measured, and what `runtime` wrote."""

from typing import Any, Literal

from ovexport.reports.benchmark import Ratio
from ovexport.storage.records import Record


class RuntimeTrial(Record):
    """A combination of runtime settings that was tried.

    Attributes:
        time_per_output_token: over that of the runtime's defaults, pair by pair.
        kl_mean_nats: how far these settings take the model from itself at full precision; None where not measured.
        reason: why it was not kept.
    """

    settings: dict[str, str]
    time_per_output_token: Ratio | None = None
    time_to_first_token: Ratio | None = None
    kl_mean_nats: float | None = None
    kept: bool
    reason: str | None = None


class WrittenSettings(Record):
    """What an IR carries for a plain `LLMPipeline(folder, "CPU")`, and how to take it out again.

    Attributes:
        options: in the graph's runtime_options, where the CPU plugin reads them.
        matmul_precision: "f32" where every MatMul is marked to keep the precision it is written in: the runtime's
            inference precision can't be written into an IR, and this is what comes nearest.
        former_xml_sha256: of the graph's file before; `former_block` is the text of it that `block` took the place of.
    """

    options: dict[str, str]
    matmul_precision: Literal["f32"] | None
    former_xml_sha256: str
    former_block: str
    block: str


class SettingsReport(Record):
    """ovexport_runtime.json in an IR's folder: the search for its best runtime settings on a machine.

    Attributes:
        chosen: the fastest that keep to the limit, as LLMPipeline takes them; none where nothing is faster than the
            defaults.
        gain: time per output token with them, over that with the runtime's defaults.
        written: what the IR itself carries from now on; `written_gain` is that of a plain LLMPipeline of the folder,
            `written_kl_mean_nats` what it costs.
        not_written: what of `chosen` has to be given to LLMPipeline.
    """

    trials: tuple[RuntimeTrial, ...]
    kl_limit_nats: float
    chosen: dict[str, str]
    gain: Ratio | None = None
    written: WrittenSettings | None = None
    written_gain: Ratio | None = None
    written_kl_mean_nats: float | None = None
    not_written: dict[str, str]
    conditions: dict[str, Any]
    versions: dict[str, str]
