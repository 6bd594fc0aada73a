"""Are the files beside the graph, and the graph's own, those that were made?

`ovexport.json` lies in the folder and whoever controls the folder can rewrite it, so nothing rests on it alone: where a
twin is given, the files are compared with the twin's too.
"""

import re
from mmap import ACCESS_READ, mmap
from pathlib import Path
from xml.etree import ElementTree

from ovexport.artifacts import ADAPTER_FOLDER, IR, IR_MANIFEST, RUN_FILES, Checkpoint, IRManifest
from ovexport.errors import ArtifactError
from ovexport.openvino.runtime_settings import SETTINGS_FILE, converted_xml
from ovexport.openvino.runtime_settings import changed_files as unlike
from ovexport.reports import Check
from ovexport.storage.digests import check_files, file_digest
from ovexport.storage.files import files_in, leaves_folder
from ovexport.verify.checks import equal, zero

_NOT_COMPANIONS = frozenset({"openvino_model.xml", "openvino_model.bin", IR_MANIFEST, SETTINGS_FILE})
_HUB_CACHE = ".cache/huggingface/"
_MAY_DIFFER = re.compile(
    r'(?<= offset=")\d+(?=")|(?<=<Runtime_version value=")[^"<>]*|(?<="OpenVINO Runtime" value=")[^"<>]*'
)
"""In the files of two graphs that say the same: where constants lie in the .bin, and which OpenVINO wrote them."""
_LAYER = re.compile(r'<layer id="(\d+)" name="([^"]*)"')
_ENDS = re.compile(r'(?:from|to)-layer="([^"]*)"')


def changed_files(ir: IR, checkpoint: Checkpoint | None) -> list[str]:
    """Files of the IR and of the checkpoint that are not as ovexport.json has them; none where that can't be told."""
    try:
        manifest = ir.manifest
    except ArtifactError:
        return [IR_MANIFEST]
    if manifest is None:
        return []
    changed = unlike(ir, manifest.files, ir.path)
    return changed + (check_files(manifest.checkpoint_files, checkpoint.path) if checkpoint else [])


def as_made(ir: IR, checkpoint: Checkpoint | None, base: IR | None, twin: IR | None) -> list[Check]:
    """The files are those that convert wrote, no link leads elsewhere, and what is given beside the IR is what it was
    made from.

    Without ovexport.json, in an IR that another tool made, there is nothing to compare with.
    """
    links = symbolic_links(ir.path)
    checks = [zero("no symbolic links among the files", "files", len(links), ", ".join(links))]
    manifest = ir.manifest
    if manifest is None:
        return checks
    outside = [name for name in (*manifest.files, *manifest.checkpoint_files) if leaves_folder(name)]
    differing = unlike(ir, manifest.files, ir.path)
    strangers = sorted(set(_names_in(ir.path)) - set(manifest.files) - {IR_MANIFEST, SETTINGS_FILE})
    detail = ", ".join([*differing, *(f"{name} was added" for name in strangers)])
    checks += [
        zero("ovexport.json names files of its folder", "files", len(outside), ", ".join(outside)),
        zero("files as convert wrote them", "files", len(differing) + len(strangers), detail),
    ]
    if checkpoint is not None:
        others = check_files(manifest.checkpoint_files, checkpoint.path)
        detail = f"{', '.join(others)}: not of the checkpoint that the IR was made from"
        checks.append(zero("made from this checkpoint", "files", len(others), detail))
        checks.append(_same_model(manifest, checkpoint.manifest.model, "checkpoint"))
    for name, other in (("base IR", base), ("twin", twin)):
        if other is not None and (theirs := other.manifest) is not None:
            checks.append(_same_model(manifest, theirs.model, name))
    return checks


def _same_model(manifest: IRManifest, expected: str, other: str) -> Check:
    """ovexport.json names the model that something else was made from."""
    detail = f"{IR_MANIFEST} says that the IR was made from {manifest.model}"
    return equal(f"made from the {other}'s model", IR_MANIFEST, manifest.model, expected, detail)


def symbolic_links(folder: Path) -> list[str]:
    """ "NAME → TARGET" of each symbolic link in a folder, but for those that the hub's cache is made of: they lead from
    `snapshots/REVISION/` to its own `blobs/`."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    return [
        f"{path.relative_to(root).as_posix()} → {path.readlink()}"
        for path in sorted(root.rglob("*"))
        if path.is_symlink() and (blobs is None or path.resolve().parent != blobs)
    ]


def companions(ir: IR, other: IR, name: str) -> Check:
    """Tokenizer, templates and configurations are the other IR's, in folders too."""
    differing = [
        file
        for file in sorted({file for folder in (ir.path, other.path) for file in _names_in(folder)})
        if not _is_of_the_product(file) and _digest_or_none(ir.path / file) != _digest_or_none(other.path / file)
    ]
    return zero(f"tokenizer and configurations as the {name}'s", "files", len(differing), ", ".join(differing))


def _is_of_the_product(file: str) -> bool:
    """Whether a file is no tokenizer, template or configuration that a product has from its base."""
    return file in _NOT_COMPANIONS or file.startswith(f"{ADAPTER_FOLDER}/")


def same_document(ir: IR, twin: IR) -> Check:
    """The graph's file says what the twin's says, names and remarks that no fingerprint covers included."""
    place = _differing_line(ir, twin)
    return zero("graph's file as the twin's", "openvino_model.xml", int(place is not None), place or "")


def differing_place(ir: IR, twin: IR) -> str | None:
    """Where a graph that can't be read differs from its twin's: a line of its file, or a constant that is no part of a
    packed weight; None where there is no such place, or the files can't be read even so."""
    try:
        line = _differing_line(ir, twin)
        return f"openvino_model.xml, {line}" if line is not None else _differing_constant(ir, twin)
    except (OSError, ArtifactError, ElementTree.ParseError, KeyError, ValueError):
        return None


def _differing_constant(ir: IR, twin: IR) -> str | None:
    """The first constant, but for those of packed weights, that has other bytes than the twin's of its name."""
    ours, theirs = (_constant_places(one) for one in (ir, twin))
    packed = {
        part for name in ours if f"{name}/scale" in ours for part in (name, f"{name}/scale", f"{name}/zero_point")
    }
    with ir.bin.open("rb") as own, twin.bin.open("rb") as other:
        maps = [mmap(file.fileno(), 0, access=ACCESS_READ) for file in (own, other)]
        for name, place in ours.items():
            if name not in packed and maps[0][place] != maps[1][theirs[name]]:
                return name
    return None


def _constant_places(ir: IR) -> dict[str, slice]:
    """Where each constant lies in the .bin, by its name in the graph's file."""
    return {
        layer.attrib["name"]: slice(
            int(entry.attrib["offset"]), int(entry.attrib["offset"]) + int(entry.attrib["size"])
        )
        for layer in ElementTree.fromstring(converted_xml(ir)).iter("layer")
        for entry in layer.iter("data")
        if layer.get("type") == "Const"
    }


def _differing_line(ir: IR, twin: IR) -> str | None:
    """The first line in which the two graphs' files differ, with the layer that it is in."""
    own, other = (_MAY_DIFFER.sub("", _document(one)).splitlines() for one in (ir, twin))
    if own == other:
        return None
    pairs = zip(own, other, strict=False)
    first = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(own), len(other)))
    return f"line {first + 1}, {_told_of(other, first)}"


def _document(ir: IR) -> str:
    try:
        return converted_xml(ir)
    except UnicodeDecodeError:
        return ir.xml.read_text(encoding="utf-8", errors="replace")


def _told_of(lines: list[str], index: int) -> str:
    """What a line of a graph's file is about: the layer around it, or the two layers of an edge."""
    if index < len(lines) and "<edge " in lines[index]:
        names = dict(_LAYER.findall("\n".join(lines)))
        return f"the edge between {' and '.join(names.get(end, end) for end in _ENDS.findall(lines[index]))}"
    around = (line.strip() for line in reversed(lines[: index + 1]) if "<layer " in line or "</layers>" in line)
    within = next(around, "")
    return f"in {within}" if "<layer " in within else "outside of all layers"


def _names_in(folder: Path) -> list[str]:
    """The files of an IR's folder, but for those that an upload and a download lay beside it and nothing loads: the
    run's own, and what the hub and its client add."""
    names = [file.relative_to(folder).as_posix() for file in files_in(folder)]
    return [name for name in names if name not in (*RUN_FILES, ".gitattributes") and not name.startswith(_HUB_CACHE)]


def _digest_or_none(path: Path) -> str | None:
    return file_digest(path) if path.is_file() else None
