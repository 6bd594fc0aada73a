"""How much damage the proof finds: single bits flipped at random, and the mistakes that tools make.

python benchmarks/reliability.py [--quick] [--json] [--save]

A small random model is converted with moved adapters. Each trial damages one file of it, verifies the product against
its checkpoint, baseline and twin, and mends the damage. A trial counts as found when verification fails (exit code 7)
or the file is refused (exit code 4); as named when the layer and the tensor, or the file, stand in what is said. Each
runs in a worker process, so that a crash would be seen and counted as not found.
"""

import random
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import command
import numpy as np
from shapes import TINY, build_run

from ovexport.artifacts import IR, RunFolder
from ovexport.errors import OvexportError
from ovexport.graph import read_graph, weights
from ovexport.recipe import CompressSpec
from ovexport.verify import verify
from ovexport.versions import stack_versions

EXPECTED_CODES = (4, 7)
FLIPS = {"codes": 400, "scale": 300, "zero_point": 300}
PARTS = {"codes": "codes", "scale": "a scale", "zero_point": "a zero point"}
OTHER_CONSTANT = "a bit flipped in another constant (norms, rotary tables, shapes)"
OTHERS = 200
QUICK_SHARE = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One trial: what is put in a file's place, and words that what is said of it must hold."""

    kind: str
    file: str
    content: bytes
    names: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Count:
    """Trials of a kind of damage."""

    trials: int = 0
    found: int = 0
    named: int = 0
    unexpected: int = 0


def main() -> None:
    """Run the trials and say what was found."""
    parser = command.parser(__doc__, "reliability", "a tenth of the trials")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        run = build_run(Path(folder), TINY, CompressSpec(group_size=32, rank=8))
        counts = count(run, random.Random(options.seed), QUICK_SHARE if options.quick else 1)
    document = {
        "counts": {kind: asdict(value) for kind, value in counts.items()},
        "conditions": {"seed": options.seed, "model": "random Llama, 2 layers of 64, INT4_ASYM group 32, rank 8"},
        "versions": stack_versions(),
    }
    command.publish(document, "reliability", options)
    if any(value.found < value.trials or value.unexpected for value in counts.values()):
        sys.exit(1)


def count(run: RunFolder, generator: random.Random, share: int) -> dict[str, Count]:
    """Carry out a share (one in `share`) of the trials."""
    counts: dict[str, Count] = {}
    pool = None
    for damage in damages(run, generator, share):
        pool = pool or ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        path = run.path / damage.file
        with damaged(path, damage.content):
            try:
                code, said = pool.submit(judge, run.path, damage.kind == OTHER_CONSTANT).result()
            except BrokenProcessPool:
                code, said, pool = -1, "", None
        entry = counts.setdefault(damage.kind, Count())
        entry.trials += 1
        entry.found += code in EXPECTED_CODES
        entry.named += code in EXPECTED_CODES and all(name in said for name in damage.names)
        if code not in EXPECTED_CODES:
            print(f"{damage.kind}: exit {code}\n{said}", file=sys.stderr)
        entry.unexpected += code not in (0, *EXPECTED_CODES)
    return counts


@contextmanager
def damaged(path: Path, content: bytes) -> Iterator[None]:
    """Other content in a file, for as long as the block lasts."""
    former = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(former)


def judge(path: Path, runtime: bool) -> tuple[int, str]:
    """Exit code of a verification and what it says; the model is compiled and run where `runtime` is asked for."""
    run = RunFolder(path)
    try:
        report = verify(
            run.ir("int4"), checkpoint=run.checkpoint, base=run.ir("bf16"), twin=run.ir("plain"), runtime=runtime
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
        yield flip(run, OTHER_CONSTANT, "int4/openvino_model.bin", at, generator, ("openvino_model.bin",))
    yield from whole_files(run, generator, share)
    for _ in range(OTHERS // share):
        yield moved_constant(ir, generator)


def whole_files(run: RunFolder, generator: random.Random, share: int) -> Iterator[Damage]:
    """Bits flipped anywhere in a file."""
    kinds = {
        "a bit flipped in the graph (.xml)": ["int4/openvino_model.xml"],
        "a bit flipped in tokenizer, detokenizer or configurations": [
            f"int4/{file.name}"
            for file in sorted(run.ir("int4").path.iterdir())
            if not file.name.startswith(("openvino_model.", "ovexport."))
        ],
        "a bit flipped in the checkpoint": ["checkpoint/adapters.safetensors", "checkpoint/checkpoint.json"],
    }
    for kind, files in kinds.items():
        for _ in range(OTHERS // share):
            file = generator.choice(files)
            size = (run.path / file).stat().st_size
            yield flip(run, kind, file, generator.randrange(size), generator, (file.rpartition("/")[2],))


def flip(run: RunFolder, kind: str, file: str, offset: int, generator: random.Random, names: tuple[str, ...]) -> Damage:
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
    """A constant of the .xml that points to where another of its size lies."""
    text = ir.xml.read_bytes()
    layers = [layer for layer in ElementTree.fromstring(text).iter("layer") if layer.get("type") == "Const"]
    entries = [entry.attrib for layer in layers for entry in layer.iter("data") if int(entry.attrib["size"]) >= 64]
    one = generator.choice(entries)
    others = [entry for entry in entries if entry["size"] == one["size"] and entry["offset"] != one["offset"]]
    other = generator.choice(others or [entry for entry in entries if entry["offset"] != one["offset"]])
    former, new = (f'offset="{entry["offset"]}" size="{one["size"]}"'.encode() for entry in (one, other))
    return Damage(
        kind="a constant of the graph that points elsewhere",
        file="int4/openvino_model.xml",
        content=text.replace(former, new, 1),
        names=("openvino_model.xml",),
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
