"""The checks put together to a VerificationReport."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import openvino as ov

from ovexport.artifacts import IR, Checkpoint, CheckpointManifest
from ovexport.errors import ArtifactError, RecipeError, UnsupportedModelError
from ovexport.openvino.graph import Weight, read_graph, weights
from ovexport.openvino.matrices import layer_matrices
from ovexport.openvino.runtime import LogitsRunner
from ovexport.openvino.runtime_adapter import running_graph
from ovexport.openvino.runtime_settings import told_settings
from ovexport.progress import Listener, silent
from ovexport.reports import Check, LayerRow, VerificationReport, VerificationSummary
from ovexport.storage.digests import file_digest
from ovexport.storage.files import files_in
from ovexport.verify.behaviour import behaviour, rounding_limit
from ovexport.verify.beside import adapter_checks
from ovexport.verify.checks import zero
from ovexport.verify.codes import Mismatches, arithmetic, arithmetic_checks, changed_floats, trained_codes
from ovexport.verify.executed import executed, no_float_weights, runs_packed
from ovexport.verify.files import as_made, changed_files, companions, differing_place, same_document
from ovexport.verify.modes import predicted_bytes
from ovexport.verify.norms import base_norms, tuned_norms
from ovexport.verify.packed import as_in_files
from ovexport.verify.packed_files import PackedFiles
from ovexport.verify.structure import adapter_operations, note, operators_beyond, packed_bytes, same_options, structure
from ovexport.verify.weight_error import weight_errors
from ovexport.verify.wiring import leaves_of_base, leaves_of_packed, leaves_of_product, operations, same_operations
from ovexport.versions import stack_versions


@dataclass(slots=True)
class _Evidence:
    """What was found, filled in as far as there is something to compare with; `reasons` says what could not be."""

    checks: list[Check] = field(default_factory=list)
    mismatches: dict[str, Mismatches] | None = None
    adapters: list[str] = field(default_factory=list)
    beyond_twin: Counter[str] | None = None
    running_packed: int | None = None
    predicted_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    twin_errors: dict[str, float] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


def verify(
    ir: IR,
    *,
    checkpoint: Checkpoint | None = None,
    base: IR | None = None,
    twin: IR | None = None,
    packed: Path | None = None,
    runtime: bool = True,
    listener: Listener = silent,
) -> VerificationReport:
    """Prove what can be proven of an IR from what is given beside it.

    Args:
        checkpoint: what was tuned; without it only the graph and the runtime are looked at.
        base: the IR of the uncompressed model, which holds the weights that the adapters are added to.
        twin: the IR with the same compression and no tuning.
        packed: the folder of the 4-bit model whose codes the IR is to have.
        runtime: compile the IR for the CPU, look at the graph that is executed, and run it on the reference.

    Returns:
        The report; `passed` is false when any check failed.

    Raises:
        RecipeError: an IR is given beside itself, or a base without a checkpoint.
        ArtifactError: an input is missing, unreadable, or of another base model.
        UnsupportedModelError: it is no language model, or the runtime can't compile it.
    """
    _check_arguments(ir, checkpoint, base, twin, packed)
    with _blaming_changed_files(ir, checkpoint, twin):
        graph = read_graph(ir)
        graph_weights = weights(graph)
        if not graph_weights:
            raise UnsupportedModelError(f"{ir.path}: no language model, no MatMul or Gather of it reads a weight")
        evidence = _gathered(ir, graph, graph_weights, checkpoint, base, twin, packed, runtime, listener)
        files = {file.relative_to(ir.path).as_posix(): file_digest(file) for file in files_in(ir.path)}
    return _report(ir, graph_weights, evidence, files)


def _report(
    ir: IR, graph_weights: tuple[Weight, ...], evidence: _Evidence, files: dict[str, str]
) -> VerificationReport:
    return VerificationReport(
        passed=all(check.passed for check in evidence.checks),
        subject=ir.path.absolute().name,
        checks=tuple(evidence.checks),
        summary=_summary(graph_weights, evidence),
        layers=tuple(_row(weight, evidence) for weight in graph_weights),
        files=files,
        notes=tuple(filter(None, [told_settings(ir)])),
        versions=stack_versions(),
    )


def _check_arguments(
    ir: IR, checkpoint: Checkpoint | None, base: IR | None, twin: IR | None, packed: Path | None
) -> None:
    if base and packed:
        raise RecipeError(
            f"--base: {packed} is a model in 4 bits, which is compared without one; leave it out, or give --checkpoint "
            "the folder that ovexport convert --keep wrote"
        )
    if base and not checkpoint:
        raise RecipeError("--base: is compared through a checkpoint; give --checkpoint too, or leave it out")
    for option, other in (("--base", base), ("--twin", twin)):
        if other and other.path.resolve() == ir.path.resolve():
            raise RecipeError(f"{option} {other.path}: is the very IR that is to be proven; give another")


def _gathered(
    ir: IR,
    graph: ov.Model,
    graph_weights: tuple[Weight, ...],
    checkpoint: Checkpoint | None,
    base: IR | None,
    twin: IR | None,
    packed: Path | None,
    runtime: bool,
    listener: Listener,
) -> _Evidence:
    """All the evidence there is; parameters as of `verify`."""
    evidence = _Evidence()
    if ir.manifest is None:
        evidence.reasons.append("no ovexport.json is in the folder: files can't be compared with what convert wrote")
    evidence.checks += as_made(ir, checkpoint, base, twin)
    other = read_graph(twin) if twin else None
    others = weights(other) if other else ()
    if checkpoint:
        _against_checkpoint(evidence, ir, graph, graph_weights, checkpoint, base, others, listener)
    elif packed:
        _against_packed(evidence, graph, graph_weights, packed, listener)
    else:
        evidence.adapters = adapter_operations(graph, graph_weights, None)
        evidence.reasons.append("no checkpoint is given: codes can't be compared with what was tuned")
    evidence.checks.append(
        zero("no adapter in the graph", "model", len(evidence.adapters), "; ".join(evidence.adapters[:3]))
    )
    if twin and other:
        _against_twin(evidence, ir, graph, graph_weights, twin, other, others, _told_norms(evidence, ir, checkpoint))
    elif base is None:
        evidence.reasons.append("neither a base IR nor a twin is given: tokenizer and configurations can't be compared")
    else:
        evidence.reasons.append("no twin is given: operators and openvino_model.xml can't be compared with its own")
    if runtime:
        _executed(evidence, ir, graph, graph_weights, checkpoint)
    else:
        evidence.reasons.append("the runtime was not checked")
    return evidence


@contextmanager
def _blaming_changed_files(ir: IR, checkpoint: Checkpoint | None, twin: IR | None) -> Iterator[None]:
    """Where something can't be read, say which files are not those that convert wrote or read, and which operation or
    constant is not as in the twin."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{error.filename or ir.path}: can't be read ({error.strerror}); mend or copy it"
        ) from error
    except (ArtifactError, UnsupportedModelError) as error:
        changed = changed_files(ir, checkpoint)
        unlike = differing_place(ir, twin) if twin else None
        blamed = [f"changed since convert: {', '.join(changed)}"] if changed else []
        blamed += [f"not as in the twin: {unlike}"] if unlike else []
        if not blamed:
            raise
        raise ArtifactError(f"{error} [{'; '.join(blamed)}]") from error


def _against_checkpoint(
    evidence: _Evidence,
    ir: IR,
    graph: ov.Model,
    graph_weights: tuple[Weight, ...],
    checkpoint: Checkpoint,
    base: IR | None,
    others: tuple[Weight, ...],
    listener: Listener,
) -> None:
    """Codes, structure and wiring; `others` are the twin's weights."""
    manifest = checkpoint.manifest
    if not {weight.name for weight in graph_weights} & {layer.name for layer in manifest.packed}:
        raise ArtifactError(
            f"{checkpoint.path}: none of its layers has a weight of its name in the IR; it was not made by ovexport "
            "convert, or of another model"
        )
    evidence.adapters = adapter_operations(graph, graph_weights, manifest)
    evidence.checks += structure(graph, graph_weights, manifest)
    evidence.checks += trained_codes(graph_weights, manifest)
    evidence.checks += adapter_checks(ir, checkpoint, manifest)
    evidence.checks += tuned_norms(graph, manifest, checkpoint.adapters)
    if base is None:
        evidence.reasons.append("no base IR is given: codes were compared by digest only, wiring not at all")
    else:
        _against_base(evidence, ir, graph, graph_weights, checkpoint, manifest, base, others, listener)
    evidence.checks.append(packed_bytes(graph_weights, manifest))
    evidence.predicted_bytes = sum(predicted_bytes(layer) for layer in manifest.packed)


def _against_base(
    evidence: _Evidence,
    ir: IR,
    graph: ov.Model,
    graph_weights: tuple[Weight, ...],
    checkpoint: Checkpoint,
    manifest: CheckpointManifest,
    base: IR,
    others: tuple[Weight, ...],
    listener: Listener,
) -> None:
    """Codes computed again, and the rest of the graph; `others` are the twin's weights."""
    original = read_graph(base)
    matrices = layer_matrices(original, manifest)
    evidence.mismatches = arithmetic(graph_weights, checkpoint, manifest, matrices, listener)
    evidence.checks += arithmetic_checks(evidence.mismatches)
    evidence.checks += changed_floats(graph, matrices, checkpoint, manifest)
    evidence.checks += base_norms(original, manifest)
    leaves, norms = leaves_of_base(matrices, manifest), [norm.name for norm in manifest.norms]
    evidence.checks += same_operations(
        operations(graph, leaves_of_product(manifest, leaves), norms),
        operations(original, leaves, norms),
        "base IR",
    )
    evidence.checks += [same_options(ir, graph, original, "base IR"), companions(ir, base, "base IR")]
    evidence.errors = weight_errors(graph_weights, manifest, matrices)
    evidence.twin_errors = weight_errors(others, manifest, matrices)


def _against_packed(
    evidence: _Evidence, graph: ov.Model, graph_weights: tuple[Weight, ...], packed: Path, listener: Listener
) -> None:
    """Codes, scales, zero points and the order of inputs."""
    checks, evidence.mismatches, layers = as_in_files(graph, graph_weights, PackedFiles(packed), listener)
    evidence.checks += checks
    evidence.adapters = adapter_operations(graph, graph_weights, None)
    evidence.predicted_bytes = sum(map(predicted_bytes, layers))
    evidence.reasons.append("the checkpoint is a model in 4 bits: codes were compared, wiring and behaviour not")


def _told_norms(evidence: _Evidence, ir: IR, checkpoint: Checkpoint | None) -> tuple[str, ...]:
    """The norms that were tuned: by the checkpoint, and only without one by the IR's own ovexport.json."""
    if checkpoint:
        return tuple(norm.name for norm in checkpoint.manifest.norms)
    told = ir.manifest.norms if ir.manifest else ()
    if told:
        evidence.reasons.append(f"no checkpoint is given: {len(told)} tuned norms can't be compared with it")
    return told


def _against_twin(
    evidence: _Evidence,
    ir: IR,
    graph: ov.Model,
    graph_weights: tuple[Weight, ...],
    twin: IR,
    other: ov.Model,
    others: tuple[Weight, ...],
    norms: tuple[str, ...],
) -> None:
    """Operators, wiring and files; `other` is the twin's graph, `others` its weights, `norms` those that were tuned."""
    beyond = evidence.beyond_twin = operators_beyond(graph, other)
    names = ", ".join(f"{count} {name}" for name, count in beyond.most_common(5))
    evidence.checks.append(zero("same operators as the twin", "model", sum(beyond.values()), names))
    evidence.checks += same_operations(
        operations(graph, leaves_of_packed(graph_weights), norms),
        operations(other, leaves_of_packed(others), norms),
        "twin",
    )
    evidence.checks += [same_options(ir, graph, other, "twin"), companions(ir, twin, "twin"), same_document(ir, twin)]


def _executed(
    evidence: _Evidence, ir: IR, graph: ov.Model, graph_weights: tuple[Weight, ...], checkpoint: Checkpoint | None
) -> None:
    nodes = executed(graph, str(ir.path))
    check = runs_packed(nodes, graph, graph_weights)
    evidence.running_packed = check.value
    evidence.checks += [check, no_float_weights(nodes, graph_weights)]
    reference = checkpoint.reference if checkpoint else None
    if reference is not None:
        run, name = LogitsRunner(running_graph(ir), str(ir.path)), str(ir.path)
        evidence.checks += behaviour(run, name, rounding_limit(graph_weights), reference)
    elif checkpoint is not None:
        evidence.reasons.append("the checkpoint holds no reference logits: behaviour can't be compared")


def _summary(graph_weights: tuple[Weight, ...], evidence: _Evidence) -> VerificationSummary:
    linear = [weight for weight in graph_weights if weight.layer_kind == "linear"]
    rows = None if evidence.mismatches is None else list(evidence.mismatches.values())
    elements = sum(weight.elements for weight in graph_weights)
    return VerificationSummary(
        linear_layers=len(linear),
        packed_int4=sum(1 for weight in linear if weight.packed and weight.element_type in ("u4", "i4")),
        packed_int8=sum(1 for weight in linear if weight.packed and weight.element_type in ("u8", "i8")),
        float=sum(1 for weight in linear if not weight.packed),
        code_mismatches=None if rows is None else sum(row.codes for row in rows),
        scale_mismatches=None if rows is None else sum(row.scales for row in rows),
        zero_point_mismatches=None if rows is None else sum(row.zero_points for row in rows),
        adapter_nodes=len(evidence.adapters),
        operators_beyond_twin=None if evidence.beyond_twin is None else sum(evidence.beyond_twin.values()),
        runtime_packed_linears=evidence.running_packed,
        weight_bytes=sum(weight.byte_size for weight in graph_weights if weight.packed),
        predicted_weight_bytes=evidence.predicted_bytes,
        bits_per_weight=8 * sum(weight.byte_size for weight in graph_weights) / elements if elements else None,
        bytes_read_per_token=sum(weight.byte_size for weight in linear),
        reason="; ".join(evidence.reasons) or None,
    )


def _row(weight: Weight, evidence: _Evidence) -> LayerRow:
    return LayerRow(
        name=weight.name,
        kind=weight.layer_kind,
        element_type=weight.element_type,
        shape=weight.shape,
        group_size=weight.group_size,
        weight_bytes=weight.byte_size,
        bits_per_weight=8 * weight.byte_size / weight.elements,
        weight_error=evidence.errors.get(weight.name),
        twin_weight_error=evidence.twin_errors.get(weight.name),
        note=note(weight),
    )


def with_checks(report: VerificationReport, checks: Sequence[Check]) -> VerificationReport:
    """A report with the checks of another product of the same checkpoint behind its own."""
    every = (*report.checks, *checks)
    return report.with_values(checks=every, passed=all(check.passed for check in every))
