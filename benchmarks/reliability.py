"""How much damage the proof finds: single bits flipped at random, and mistakes that tools make.

python benchmarks/reliability.py [--quick] [--json] [--save]

A small random model with moved adapters is converted. Each trial damages one file, verifies the product against its
checkpoint, baseline and twin, and repairs the damage. It verifies three times: with ovexport.json as convert wrote it,
without that file, and with its digests rewritten to match the damaged file. A trial counts as found if verification
fails (exit code 7) or the file is refused (exit code 4). It counts as named if the operation, the tensor or the file is
named both without ovexport.json and with the rewritten one, so only the proof itself can have named it. If damage is
not found, the arithmetic of tuning computes the checkpoint's codes again, to see whether they are the same. The runtime
is not examined, so everything is found in the files. Each trial runs in a worker process: a crash would be noticed and
would not count as found.
"""

import json
import random
import re
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import command
import numpy as np
import torch
from shapes import TINY, build_run

from ovexport.artifacts import IR, RunFolder
from ovexport.errors import OvexportError
from ovexport.openvino.graph import read_graph, weights
from ovexport.openvino.matrices import layer_matrices
from ovexport.recipe import CompressSpec
from ovexport.storage.digests import file_digest
from ovexport.verify import verify
from ovexport.versions import stack_versions
from ovexport.weights.adapters import load_quantizer

EXPECTED_CODES = (4, 7)
FLIPS = {"codes": 400, "scale": 300, "zero_point": 300}
PARTS = {"codes": "codes", "scale": "a scale", "zero_point": "a zero point"}
OTHERS = 200
QUICK_SHARE = 10
MANIFEST = "int4/ovexport.json"
CASES = ("in place", "removed", "rewritten")


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One trial: what is put in a file's place.

    Attributes:
        names: what of operations and tensors it damages; empty where the file has none.
        any_of: whether one of the names is enough, as for the line of a graph's file that tells of two.
    """

    kind: str
    file: str
    content: bytes
    names: tuple[str, ...] = ()
    any_of: bool = False

    def names_part(self, said: str) -> bool:
        """Whether the operation or tensor stands in what is said."""
        return bool(self.names) and (any if self.any_of else all)(name in said for name in self.names)

    def names_file(self, said: str) -> bool:
        """Whether the file stands in what is said."""
        return self.file.rpartition("/")[2] in said


@dataclass(slots=True, kw_only=True)
class Count:
    """Trials of a kind of damage.

    Attributes:
        found: by what was done to ovexport.json.
        part_named: the operation or tensor; None where there is none to be named.
        same_codes: of those not found, how many leave a checkpoint that gives the same codes.
        missed: the others that were not found, each in words.
    """

    trials: int = 0
    found: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CASES, 0))
    part_named: int | None = None
    file_named: int = 0
    same_codes: int = 0
    missed: list[str] = field(default_factory=list)
    unexpected: int = 0


def main() -> None:
    """Run the trials and say what was found."""
    parser = command.parser(__doc__, "reliability", "a tenth of the trials")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        run = build_run(Path(folder), TINY, CompressSpec(group_size=32, rank=8, rounding="nearest"))
        counts = count(run, random.Random(options.seed), QUICK_SHARE if options.quick else 1)
    document = {
        "counts": {kind: asdict(value) for kind, value in counts.items()},
        "conditions": {"seed": options.seed, "model": "random Llama, 2 layers of 64, INT4_ASYM group 32, rank 8"},
        "versions": stack_versions(),
    }
    command.publish(document, "reliability", options)
    if any(value.found["in place"] < value.trials or value.missed or value.unexpected for value in counts.values()):
        sys.exit(1)


def count(run: RunFolder, generator: random.Random, share: int) -> dict[str, Count]:
    """Carry out a share (one in `share`) of the trials."""
    counts: dict[str, Count] = {}
    pool = None
    for damage in damages(run, generator, share):
        entry = counts.setdefault(damage.kind, Count())
        said = {}
        with damaged(run.path / damage.file, damage.content), damaged(run.path / MANIFEST, None):
            for case in CASES:
                set_manifest(run, case, damage.file)
                pool = pool or ProcessPoolExecutor(1, mp_context=get_context("spawn"))
                try:
                    code, said[case] = pool.submit(judge, run.path).result()
                except BrokenProcessPool:
                    code, said[case], pool = -1, "", None
                entry.found[case] += code in EXPECTED_CODES
                entry.unexpected += code not in (0, *EXPECTED_CODES)
                if code not in (0, *EXPECTED_CODES):
                    print(f"{damage.kind}: exit {code}\n{said[case]}", file=sys.stderr)
            note(entry, damage, said, unchanged=not all(said.values()) and same_codes(run))
    return counts


def note(entry: Count, damage: Damage, said: dict[str, str], *, unchanged: bool) -> None:
    """Count a trial's names, and what was missed."""
    entry.trials += 1
    own = [said["removed"], said["rewritten"]]
    if damage.names:
        entry.part_named = (entry.part_named or 0) + all(damage.names_part(text) for text in own)
    entry.file_named += all(damage.names_file(text) for text in own)
    if not all(said.values()):
        entry.same_codes += unchanged
        if not unchanged:
            entry.missed.append(f"{damage.file}: {', '.join(damage.names)}")


def set_manifest(run: RunFolder, case: str, file: str) -> None:
    """Bring ovexport.json into the state of a case, one after the other."""
    path = run.path / MANIFEST
    if case == "removed":
        path.rename(run.path / "ovexport.json.aside")
    elif case == "rewritten":
        (run.path / "ovexport.json.aside").rename(path)
        record = json.loads(path.read_text())
        folder, _, name = file.partition("/")
        record["files" if folder == "int4" else "checkpoint_files"][name] = file_digest(run.path / file)
        path.write_text(json.dumps(record))


def same_codes(run: RunFolder) -> bool:
    """Whether the checkpoint, by the arithmetic of tuning, still gives the very codes that it records."""
    try:
        manifest, adapters = run.checkpoint.manifest, run.checkpoint.adapters
        matrices = layer_matrices(read_graph(run.ir("bf16")), manifest)
        return all(
            load_quantizer(layer, adapters)
            .quantize(torch.from_numpy(matrices[layer.name].reader()(slice(None))))
            .digest()
            == manifest.digests[layer.name]
            for layer in manifest.packed
        )
    except (OvexportError, KeyError, RuntimeError):
        return False


@contextmanager
def damaged(path: Path, content: bytes | None) -> Iterator[None]:
    """Other content in a file, for as long as the block lasts; None leaves it to the block to change it."""
    former = path.read_bytes()
    if content is not None:
        path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(former)


def judge(path: Path) -> tuple[int, str]:
    """Exit code of a verification and what it says; nothing where it passes."""
    run = RunFolder(path)
    try:
        report = verify(
            run.ir("int4"), checkpoint=run.checkpoint, base=run.ir("bf16"), twin=run.ir("plain"), runtime=False
        )
    except OvexportError as error:
        return error.exit_code, str(error)
    except Exception:
        return 1, traceback.format_exc()
    failed = [f"{check.name} {check.subject} {check.detail}" for check in report.checks if not check.passed]
    return (0 if report.passed else 7), "\n".join(failed)


def damages(run: RunFolder, generator: random.Random, share: int) -> Iterator[Damage]:
    """Every trial, in a fixed order for a seed."""
    ir = run.ir("int4")
    places = tensor_places(ir)
    for part, trials in FLIPS.items():
        for _ in range(trials // share):
            name, offset, length = generator.choice([place[1:] for place in places if place[0] == part])
            at = offset + generator.randrange(length)
            yield flip(run, f"a bit flipped in {PARTS[part]}", "int4/openvino_model.bin", at, generator, (name, part))
    for _ in range(OTHERS // share):
        name, offset, length = generator.choice([place[1:] for place in places if place[0] == "scale"])
        yield nudge(run, offset + 2 * generator.randrange(length // 2), generator, name)
    others = [place for place in places if place[0] == "other"]
    for _ in range(OTHERS // share):
        _, _, offset, length = generator.choice(others)
        at = offset + generator.randrange(length)
        kind = "a bit flipped in another constant (norms, rotary tables, shapes)"
        sharing = tuple(name for _, name, begin, size in others if begin <= at < begin + size)
        yield replace(flip(run, kind, "int4/openvino_model.bin", at, generator, sharing), any_of=True)
    yield from whole_files(run, generator, share)
    for _ in range(OTHERS // share):
        yield moved_constant(ir, generator)


def whole_files(run: RunFolder, generator: random.Random, share: int) -> Iterator[Damage]:
    """Bits flipped anywhere in a file."""
    xml = run.ir("int4").xml.read_text()
    for _ in range(OTHERS // share):
        at = generator.randrange(len(xml))
        named = layers_at(xml, at)
        damage = flip(run, "a bit flipped in the graph (.xml)", "int4/openvino_model.xml", at, generator, named)
        yield replace(damage, any_of=True)
    companions = [
        f"int4/{file.name}"
        for file in sorted(run.ir("int4").path.iterdir())
        if not file.name.startswith(("openvino_model.", "ovexport."))
    ]
    kind = "a bit flipped in tokenizer, detokenizer or configurations"
    for _ in range(OTHERS // share):
        file = generator.choice(companions)
        yield flip(run, kind, file, generator.randrange((run.path / file).stat().st_size), generator)
    for _ in range(OTHERS // share):
        file = generator.choice(["checkpoint/adapters.safetensors", "checkpoint/checkpoint.json"])
        at = generator.randrange((run.path / file).stat().st_size)
        named = tensor_at(run.path / file, at) if file.endswith(".safetensors") else ()
        yield flip(run, "a bit flipped in the checkpoint", file, at, generator, named)


def layers_at(xml: str, offset: int) -> tuple[str, ...]:
    """Names of the layers that a place in a graph's file tells of: the one around it, or the two of an edge."""
    names = dict(re.findall(r'<layer id="(\d+)" name="([^"]*)"', xml))
    line = xml[xml.rfind("\n", 0, offset) + 1 : xml.find("\n", offset)]
    if "<edge " in line:
        return tuple(names[layer] for layer in re.findall(r'-layer="(\d+)"', line))
    before = re.findall(r'<layer id="\d+" name="([^"]*)"', xml[: xml.find("\n", offset)])
    return (before[-1],) if before and offset < xml.find("</layers>") else ()


def tensor_at(file: Path, offset: int) -> tuple[str, ...]:
    """The layer whose tensor lies at a place of a safetensors file; none in its header."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {name: entry for name, entry in json.loads(data[8:start]).items() if name != "__metadata__"}
    return tuple(
        name.rpartition(".")[0]
        for name, entry in tensors.items()
        if entry["data_offsets"][0] <= offset - start < entry["data_offsets"][1]
    )


def flip(
    run: RunFolder, kind: str, file: str, offset: int, generator: random.Random, names: tuple[str, ...] = ()
) -> Damage:
    """One bit of a byte."""
    content = bytearray((run.path / file).read_bytes())
    content[offset] ^= 1 << generator.randrange(8)
    return Damage(kind=kind, file=file, content=bytes(content), names=names)


def nudge(run: RunFolder, offset: int, generator: random.Random, name: str) -> Damage:
    """A float16 scale moved to its neighbour."""
    content = bytearray(run.ir("int4").bin.read_bytes())
    value = np.frombuffer(content, np.float16, count=1, offset=offset)[0]
    content[offset : offset + 2] = np.nextafter(value, np.float16(generator.choice((-np.inf, np.inf)))).tobytes()
    return Damage(
        kind="a scale moved by one float16 step",
        file="int4/openvino_model.bin",
        content=bytes(content),
        names=(name, "scale"),
    )


def moved_constant(ir: IR, generator: random.Random) -> Damage:
    """A constant of the .xml that points to where other bytes lie, those of another of its size if there is one."""
    text, weights_of = ir.xml.read_bytes(), ir.bin.read_bytes()
    layers = [layer for layer in ElementTree.fromstring(text).iter("layer") if layer.get("type") == "Const"]
    named = [(layer.get("name", ""), entry.attrib) for layer in layers for entry in layer.iter("data")]
    named = [(name, entry) for name, entry in named if int(entry["size"]) >= 64]
    entries = [entry for _, entry in named]
    name, one = generator.choice(named)
    length = int(one["size"])
    values = {entry["offset"]: weights_of[int(entry["offset"]) :][:length] for entry in entries}
    apart = [entry for entry in entries if values[entry["offset"]] != values[one["offset"]]]
    other = generator.choice([entry for entry in apart if entry["size"] == one["size"]] or apart)
    former, new = (f'offset="{entry["offset"]}" size="{one["size"]}"'.encode() for entry in (one, other))
    return Damage(
        kind="a constant of the graph that points elsewhere",
        file="int4/openvino_model.xml",
        content=text.replace(former, new, 1),
        names=(name.removesuffix("/scale").removesuffix("/zero_point"),),
    )


def tensor_places(ir: IR) -> list[tuple[str, str, int, int]]:
    """Where each constant lies in the .bin: part, layer, offset and length in bytes."""
    graph = read_graph(ir)
    parts = {}
    for weight in weights(graph):
        for part in ("codes", "scale", "zero_point"):
            parts[getattr(weight, part).get_friendly_name()] = (part, weight.name)
    del graph
    places = []
    for layer in ElementTree.parse(ir.xml).getroot().iter("layer"):
        if layer.get("type") == "Const":
            entry = next(layer.iter("data")).attrib
            part, name = parts.get(layer.get("name"), ("other", layer.get("name")))
            places.append((part, name, int(entry["offset"]), int(entry["size"])))
    return places


if __name__ == "__main__":
    main()
