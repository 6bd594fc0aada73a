"""Runtime settings that an IR carries itself, written into its graph's file and taken out again, byte for byte.

The CPU plugin reads the precision of the KV cache and the group size of dynamic quantization from the file's
runtime_options. An inference precision it does not read; but an operation that is marked as precise keeps its own, and
that is where dynamic quantization of activations works. The file is edited as text, so that what was there comes back.
"""

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ovexport.artifacts import IR
from ovexport.errors import ArtifactError, UnsupportedModelError
from ovexport.reports import SettingsReport, WrittenSettings
from ovexport.storage.digests import check_files
from ovexport.storage.files import write_text
from ovexport.storage.records import read_record, write_record

SETTINGS_FILE = "ovexport_runtime.json"
CARRIED = ("KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
"""What the CPU plugin reads from an IR's runtime_options."""

_MARK = '<rt_info><attribute name="precise" version="0" /></rt_info>'
_MATMUL = re.compile(r'(<layer [^>]*type="MatMul"[^>]*>\s*<data [^>]*/>)(?!\s*<rt_info>)')
_MARKED = re.compile(r'(<layer [^>]*type="MatMul"[^>]*>\s*<data [^>]*/>)' + re.escape(_MARK))
_BLOCK = re.compile(r"<runtime_options\s*/>|<runtime_options>.*?</runtime_options>", re.DOTALL)
_OPTION = re.compile(r'<(\w+) value="([^"]*)"\s*/>')


def settings_report(ir: IR) -> SettingsReport | None:
    """The search that the IR's folder holds; None where there was none.

    Raises:
        ArtifactError: its file is corrupt.
    """
    path = ir.path / SETTINGS_FILE
    return read_record(path, SettingsReport) if path.is_file() else None


def with_settings(text: str, options: Mapping[str, str], *, precise: bool) -> tuple[str, WrittenSettings]:
    """A graph's text with other runtime options and, where `precise`, its MatMuls marked.

    Raises:
        UnsupportedModelError: the text has no runtime_options, or marks of its own.
    """
    former_block = _BLOCK.search(text)
    if former_block is None or len(_BLOCK.findall(text)) > 1:
        raise UnsupportedModelError("openvino_model.xml: has no runtime_options to write to; convert the model again")
    if _MARK in text:
        raise UnsupportedModelError("openvino_model.xml: has operations that are marked as precise already")
    former = former_block.group()
    values = dict(_OPTION.findall(former)) | dict(options)
    block = "<runtime_options>" + "".join(f'<{name} value="{value}" />' for name, value in values.items())
    block += "</runtime_options>"
    written = WrittenSettings(
        options=values,
        matmul_precision="f32" if precise else None,
        former_xml_sha256=_digest(text),
        former_block=former,
        block=block,
    )
    text = text.replace(former, block)
    return (_MATMUL.sub(rf"\1{_MARK}", text) if precise else text), written


def without_settings(text: str, written: WrittenSettings) -> str:
    """The text as it was before.

    What is written must be what `with_settings` writes into that text, to the byte, and of the options only CARRIED may
    differ: a report can't excuse any other change of the file.

    Raises:
        ArtifactError: it was changed since.
    """
    if _digest(text) == written.former_xml_sha256:
        return text
    before = _MARKED.sub(r"\1", text).replace(written.block, written.former_block)
    if _digest(before) != written.former_xml_sha256 or not _only_settings(before, text, written):
        raise ArtifactError(
            f"openvino_model.xml: was changed after its runtime settings had been written; convert the model again, or "
            f"remove {SETTINGS_FILE} to keep it as it is"
        )
    return before


def _only_settings(before: str, after: str, written: WrittenSettings) -> bool:
    """Whether the two texts differ in settings that an IR can carry, and in nothing else."""
    former = dict(_OPTION.findall(written.former_block))
    changed = {name for name, value in written.options.items() if former.get(name) != value}
    if not changed <= set(CARRIED) or not set(former) <= set(written.options):
        return False
    try:
        again, _ = with_settings(before, written.options, precise=written.matmul_precision is not None)
    except UnsupportedModelError:
        return False
    return again == after


def is_written(ir: IR, written: WrittenSettings) -> bool:
    """Whether the graph's file carries the settings now.

    Raises:
        ArtifactError: as without_settings.
    """
    text = read_xml_text(ir)
    return without_settings(text, written) != text


def write_settings(ir: IR, report: SettingsReport) -> None:
    """Keep the report in the IR's folder, and put what it has as written into the graph's file; what an earlier search
    wrote there goes."""
    former, text = settings_report(ir), read_xml_text(ir)
    if former and former.written:
        text = without_settings(text, former.written)
        write_text(text, ir.xml)
    write_record(report, ir.path / SETTINGS_FILE)
    if report.written is not None:
        precise = report.written.matmul_precision is not None
        write_text(with_settings(text, report.written.options, precise=precise)[0], ir.xml)


def undo_settings(ir: IR) -> None:
    """Make the graph's file what it was, and remove the report.

    Raises:
        ArtifactError: there is nothing to undo, or the file was changed since.
    """
    report = settings_report(ir)
    if report is None:
        raise ArtifactError(f"{ir.path}: no runtime settings were written into it; there is nothing to undo")
    if report.written is not None:
        write_text(without_settings(read_xml_text(ir), report.written), ir.xml)
    (ir.path / SETTINGS_FILE).unlink()


def converted_xml(ir: IR) -> str:
    """The graph's file as it was converted: without the settings that were written into it later, where it holds
    nothing but settings beside what was converted."""
    text = read_xml_text(ir)
    written = _carried_by(ir)
    return without_settings(text, written) if written else text


def changed_files(ir: IR, files: Mapping[str, str], root: Path) -> list[str]:
    """The files that are missing or not as they were, the graph's taken without settings that were written into it.

    Args:
        files: SHA-256 by path relative to `root`.
    """
    changed = check_files(files, root)
    name = ir.xml.relative_to(root).as_posix()
    if name in changed and ir.xml.is_file():
        with suppress(UnicodeDecodeError):
            if _digest(converted_xml(ir)) == files[name]:
                changed.remove(name)
    return changed


def converted_options(ir: IR, options: Mapping[str, str]) -> dict[str, str]:
    """Runtime options as they were converted, of those that the graph has now; only CARRIED ones can differ."""
    written = _carried_by(ir)
    if written is None:
        return dict(options)
    former = dict(_OPTION.findall(written.former_block))
    kept = {name: value for name, value in options.items() if name not in CARRIED}
    return kept | {name: former[name] for name in CARRIED if name in former}


def told_settings(ir: IR) -> str | None:
    """What the IR carries, in words; None where it is as it was converted."""
    written = _carried_by(ir)
    if written is None:
        return None
    carried = [f"{name} {written.options[name]}" for name in CARRIED if name in written.options]
    carried += [f"MatMuls in {written.matmul_precision}"] if written.matmul_precision else []
    return "carries runtime settings that were written into it after the conversion: " + ", ".join(carried)


def _carried_by(ir: IR) -> WrittenSettings | None:
    """Settings that the file holds now, where they are nothing but settings."""
    try:
        report = settings_report(ir)
        return report.written if report and report.written and is_written(ir, report.written) else None
    except (ArtifactError, UnicodeDecodeError):
        return None


def read_xml_text(ir: IR) -> str:
    """The graph's file, its line ends as they are."""
    with Path(ir.require().xml).open(encoding="utf-8", newline="") as file:
        return file.read()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
