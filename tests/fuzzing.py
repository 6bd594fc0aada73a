"""Hostile and broken inputs from a seed, and a worker that hands each to the command line under a time limit.

A case is a command line and the files that it reads. It passes when the command ends by itself, with an exit code of the
documented ones but 1 and without a traceback. Each is made from its kind, the seed and its number alone, so that one that
fails can be made again by itself.
"""

import base64
import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ovexport.recipe import Recipe

COUNTS = {"recipe": 1000, "model": 200, "data": 200, "ir": 100}
EXIT_CODES = (0, 2, 3, 4, 5, 6, 7, 8)
TIME_LIMIT_S = 30
_MEMORY_BYTES = 12 << 30

ODD_TEXTS = (
    "", " ", "\n", "\0", "\x1b[2J\x1b[31mPROVEN", "\u202eabc", "\ufeff", "\U0001f600", "a" * 300, "ä" * 200, "../" * 30,
    "/etc/passwd", "/dev/zero", "[red]x[/red]", "[/]", "%s%n", "${HOME}", "a/b/c", "-1", "nan", "*", "[", "{}", "\r\n",
    "<script>", "C:\\x", "offline", "hf://x/y", "https://[", "x" * 5000,
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, -(10**30), 0.0, -0.5, 1e-320, 1e308, 1e999, -1e999,
    float("nan"), [], {}, [[]], [None], {"a": 1}, ["x"] * 50, [1, "2", 3.0], *ODD_TEXTS,
)  # fmt: skip

PLAUSIBLE: tuple[Any, ...] = (
    1, 2, 3, 5, 7, 15, 16, 17, 64, 128, 1000, 10**5, 10**6, 10**9, 0, 0.5, 0.999, 1e-30, 1e-3, 1e30, True, False, "cpu",
    "auto", "float32", "task", "int4_sym", "int8", "fq_lora_nls", [1], [64, 32], [8, 4, 2], "short", "f32", "smaller_group",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Material:
    """What the cases are mutations of: a model's folder, a finished run of it, a recipe's sections and a text."""

    model: Path
    run: Path
    recipe: dict[str, Any]
    text: Path


@dataclass(frozen=True, slots=True)
class Case:
    """A command line, whose files lie in a folder of its own."""

    kind: str
    number: int
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a case ended: an exit code, "hang" or "crash", and what was printed."""

    end: int | str
    output: str

    @property
    def traceback(self) -> bool:
        """Whether a defect showed itself."""
        return "Traceback (most recent call last)" in self.output or self.end == 1

    @property
    def passed(self) -> bool:
        """Whether the input was done or refused as it should be."""
        return self.end in EXIT_CODES and not self.traceback


def make(kind: str, number: int, seed: int, material: Material, folder: Path) -> Case:
    """Write the files of a case into an empty folder."""
    generator = random.Random(f"{seed} {kind} {number}")
    arguments = _KINDS[kind](generator, material, folder)
    return Case(kind, number, tuple(str(argument) for argument in arguments))


class Worker:
    """A process that runs command lines of ovexport, one after the other, and is begun anew when one takes it down."""

    def __init__(self) -> None:
        self._process: Any = None
        self._end: Connection | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, arguments: tuple[str, ...], folder: Path) -> Outcome:
        """Run a command line with a folder as the working directory."""
        if self._process is None:
            self._start()
        assert self._end is not None
        self._end.send((arguments, str(folder)))
        try:
            if self._end.poll(TIME_LIMIT_S):
                return Outcome(*self._end.recv())
            end: int | str = "hang"
        except EOFError:
            end = "crash"
        self._stop()
        return Outcome(end, "")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._end, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other,), daemon=True)
        self._process.start()
        other.close()
        self._end.recv()  # once everything heavy is imported

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = self._end = None


def serve(end: Connection) -> None:
    """The worker's side: run what arrives, and answer with its exit code and its output."""
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries write past Python
    from ovexport.cli import main

    end.send("ready")
    while True:
        arguments, folder = end.recv()
        os.chdir(folder)
        output = io.StringIO()
        sys.argv = ["ovexport", *arguments]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code: Any = 0
            try:
                main()
            except SystemExit as error:
                code = error.code or 0
            except BaseException:
                traceback.print_exc()
                code = 1
        end.send((code, output.getvalue()[-20_000:]))


def cases(kinds: dict[str, int], seed: int, material: Material, room: Path) -> Iterator[tuple[Case, Path]]:
    """Every case of the counts with its folder, which is gone once the next one is asked for."""
    for kind, count in kinds.items():
        for number in range(count):
            folder = room / f"{kind}-{number}"
            folder.mkdir(parents=True)
            yield make(kind, number, seed, material, folder), folder
            shutil.rmtree(folder, ignore_errors=True)


def _recipe(generator: random.Random, material: Material, folder: Path) -> list[Any]:
    sections = json.loads(json.dumps(material.recipe))
    for _ in range(generator.choice((0, 1, 1, 1, 1, 2))):
        _mutate(generator, sections)
    text = _toml(sections)
    text = _damaged_text(generator, text) if generator.random() < 0.15 else text
    path = folder / generator.choice(("recipe.toml",) * 8 + ("in[red]t4.toml", "\x1b[31m.toml", "ä.toml"))
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    if generator.random() < 0.25:
        return _odd_command(generator, material, folder, path)
    overrides = [
        part for _ in range(generator.choice((0, 0, 0, 1))) for part in ("--set", _override(generator, sections))
    ]
    command = ["plan", path, "--out", folder / "out", *overrides]
    return command + generator.choice(([], ["--json"], ["--quiet"]))


def _odd_command(generator: random.Random, material: Material, folder: Path, recipe: Path) -> list[Any]:
    """Arguments of other commands, most of which can't be."""
    odd = generator.choice(ODD_TEXTS).replace("\0", "\x01") or "x"
    ir, number = material.run / "int4", generator.choice(("0", "-1", "9" * 20, "9" * 5000, "1e3", "nan", odd))
    return generator.choice(
        [
            ["plan", "--model", odd],
            ["plan", odd],
            ["plan", recipe, "--model", odd],
            ["plan", recipe, "--out", odd if "/dev" not in odd else "out"],
            ["run", odd, "--out", "out"],
            ["run", recipe, "--until", odd, "--out", "out"],
            ["run", recipe, "--until", "prepare", "--gate", odd, "--out", "out"],
            ["run", recipe, "--until", "prepare", "--out", folder / ("n" * 300)],
            ["run", recipe, "--until", "prepare", "--junit", odd, "--out", "out"],
            ["run", recipe, "--push-to-hub", odd, "--out", "out"],
            ["verify", odd],
            ["verify", ir, "--checkpoint", odd, "--no-runtime"],
            ["verify", ir, "--twin", odd, "--no-runtime"],
            ["verify", ir, "--no-runtime", "--gate", f"packed_int4>={number}"],
            ["verify", ir, "--no-runtime", "--gate", odd, "--junit", odd],
            ["evaluate", odd, "--reference", odd],
            ["evaluate", ir, "--ground-truth", odd, "--encoder", odd, "--out", "e"],
            ["evaluate", ir, "--reference", odd, "--data", odd, "--out", "e"],
            ["evaluate", ir, "--reference", ir, "--sequences", number, "--out", "e"],
            ["evaluate", ir, "--tasks", odd, "--out", "e"],
            ["bench", odd, "--prompt-tokens", number],
            ["bench", ir, "--output-tokens", number, "--batch-size", odd],
            ["bench", ir, ir],
            ["bench", ir, "--device", odd],
            ["bench", ir, "--format", odd],
            ["convert", odd, "--model", material.model, "--out", "o"],
            ["convert", recipe, "--model", odd, "--out", "o", "--ranks", number],
            ["convert", material.run / "checkpoint", "--model", odd, "--out", odd],
            ["search", odd, "--ranks", number],
            ["search", material.run],
            ["report", odd],
            ["report", odd, odd, "--out", "c.html"],
            ["runtime", odd],
            ["runtime", ir],
            [odd],
            ["plan", recipe, f"--{odd}"],
            ["tune", recipe, "--out", material.run],
        ]
    )


def _override(generator: random.Random, sections: dict[str, Any]) -> str:
    section = generator.choice([*sections, "gates", "task", "search", "verify", "convert", "nothing"])
    keys = [*sections.get(section, {}), "seed", "x"]
    value = generator.choice(
        (
            "",
            "1",
            "9" * 6000,
            "1e999",
            "nan",
            "[" * 200,
            "[1,2",
            '"x"',
            "true",
            "2020-01-01",
            "{a=1}",
            "0x" + "f" * 5000,
            "\x1b",
        )
    )
    return generator.choice(
        (f"{section}.{generator.choice(keys)}={value}", f"{section}={value}", ".".join("a" * 200) + "=1", value)
    )


def _mutate(generator: random.Random, sections: dict[str, Any]) -> None:
    """Change, remove or add something in a recipe's sections."""
    section = generator.choice(list(sections))
    values = sections[section]
    if not isinstance(values, dict) or not values:
        return
    key = generator.choice(list(values))
    change = generator.randrange(9)
    if change == 0:
        del values[key]
    elif change == 1:
        values[generator.choice(ODD_TEXTS)] = 1
    elif change == 2:
        sections[generator.choice(("gates", "task", "search", "bench", "zz", section))] = generator.choice(ODD_VALUES)
    elif change == 3:
        values[key] = _nested(generator.choice((1, 30, 70, 200)))
    elif change == 4:
        values[key] = generator.choice(ODD_VALUES)
    else:
        known = Recipe.model_fields[section].annotation if section in Recipe.model_fields else None
        key = generator.choice(list(getattr(known, "model_fields", values)))
        values[key] = generator.choice(ODD_TEXTS if isinstance(values.get(key), str) else PLAUSIBLE)


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _toml(value: Any) -> str:
    """TOML of anything, what can't be in it included."""
    lines = []
    for section, values in value.items():
        if not isinstance(values, dict):
            lines.insert(0, f"{json.dumps(section)} = {_toml_value(values)}")
            continue
        lines.append(f"[{json.dumps(section)}]")
        lines += [f"{json.dumps(key)} = {_toml_value(item)}" for key, item in values.items()]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


def _damaged_text(generator: random.Random, text: str) -> str:
    """A text with something in it that makes readers stumble."""
    at = generator.randrange(len(text) + 1)
    return generator.choice(
        (
            text[:at],
            text + text,
            text[:at] + generator.choice(ODD_TEXTS) + text[at:],
            text[:at] + "\udcff" + text[at:],
            "\ufeff" + text,
            text.replace("\n", "\r\n"),
            text.replace("\n", "\r"),
            f"{text}\nz = {'9' * 6000}\n",
            f"{text}\nz = {'[' * 3000}\n",
            f"{text}\n{'.'.join('a' * 3000)} = 1\n",
            f"{text}\nz = {'{a=' * 300}1{'}' * 300}\n",
            f"{text}\nz = 2020-13-45\n",
            f'{text}\nz = "{"x" * 300_000}"\n',
        )
    )


def _model(generator: random.Random, material: Material, folder: Path) -> list[Any]:
    name = generator.choice(("model",) * 9 + ("in[red]t4", "\x1b[2Jm"))
    model = folder / name
    shutil.copytree(material.model, model)
    for _ in range(generator.choice((1, 1, 2))):
        generator.choice((_config, _config, _weights, _weights, _tokenizer, _index, _companion, _card))(
            generator, model
        )
    if generator.random() < 0.4:
        return ["plan", "--model", model]
    recipe = folder / "recipe.toml"
    recipe.write_text(_toml(material.recipe | {"model": {"id": str(model)}}))
    return [generator.choice(("plan", "compress")), recipe, "--out", folder / "out"]


def _config(generator: random.Random, model: Path) -> None:
    _damage_json(generator, model / "config.json")


def _tokenizer(generator: random.Random, model: Path) -> None:
    _damage_json(generator, model / generator.choice(("tokenizer.json", "tokenizer_config.json")))


def _damage_json(generator: random.Random, path: Path) -> None:
    """Change a value somewhere in a JSON file, or its text."""
    text = path.read_text(encoding="utf-8")
    values = json.loads(text)
    if generator.random() < 0.25:
        path.write_bytes(_damaged_text(generator, text[:200_000]).encode("utf-8", "surrogateescape"))
        return
    place = values
    while isinstance(place, dict) and place:
        key = generator.choice(list(place))
        if isinstance(place[key], dict) and place[key] and generator.random() < 0.7:
            place = place[key]
            continue
        place[key] = generator.choice((*ODD_VALUES, _nested(2000)))
        if generator.random() < 0.1:
            del place[key]
        break
    if generator.random() < 0.15:
        key = generator.choice(
            ("auto_map", "transformers_weights", "quantization_config", "rope_scaling", "layer_types", "torch_dtype")
        )
        values[key] = generator.choice(
            (*ODD_VALUES, {"AutoModelForCausalLM": "x.Y"}, "../x.safetensors", {"quant_method": "gptq"})
        )
    path.write_text(_json(values), encoding="utf-8", errors="surrogatepass")


def _json(value: Any) -> str:
    """JSON of anything, however deep."""
    depth = 0
    while isinstance(value, list) and len(value) == 1:
        value, depth = value[0], depth + 1
    if depth:
        return "[" * depth + _json(value) + "]" * depth
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_json(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def _weights(generator: random.Random, model: Path) -> None:
    """Damage the weights: values, shapes, types, names, or the file."""
    import torch
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    content = path.read_bytes()
    change = generator.randrange(12)
    if change < 5:
        tensors = load_file(path)
        name = generator.choice(sorted(tensors))
        value = tensors[name].float()
        tensors[name] = (
            torch.full_like(value, 1e38), torch.full_like(value, float("nan")), value[:1].clone(), value.double() * 1e300,
            torch.zeros_like(value),
        )[change]  # fmt: skip
        if generator.random() < 0.2:
            tensors["more"] = tensors.pop(name)
        save_file(tensors, path, metadata={"format": "pt"})
    elif change == 5:
        path.write_bytes(content[: generator.randrange(len(content))])
    elif change == 6:
        path.write_bytes(generator.randbytes(generator.choice((0, 1, 8, 100))))
    elif change == 7:
        path.unlink()
    elif change == 8:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(_damaged_header(generator, content))


def _damaged_header(generator: random.Random, content: bytes) -> bytes:
    """A safetensors file whose header says something else."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = generator.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    change = generator.randrange(6)
    if change == 0:
        entry["shape"] = generator.choice(([2**62, 2**62], [-1], [0], [1] * 100, ["x"], [2**40]))
    elif change == 1:
        entry["data_offsets"] = generator.choice(([0, 2**63], [-1, 5], [10, 2], [0], ["a", "b"], [0, 10**30]))
    elif change == 2:
        entry["dtype"] = generator.choice(("F4", "I64", "BOOL", "", 5, None))
    elif change == 3:
        header["__metadata__"] = generator.choice(([], 5, {"format": 1}, {"format": "tf"}, {"x": "y" * 100_000}))
    elif change == 4:
        header[generator.choice(ODD_TEXTS)] = header.pop(name)
    else:
        header = generator.choice(([], 5, {}, {"a": 1}))
    encoded = json.dumps(header).encode()
    stated = generator.choice((len(encoded),) * 5 + (2**63, 2**64 - 1, 0))
    return struct.pack("<Q", stated) + encoded + content[8 + length :]


def _index(generator: random.Random, model: Path) -> None:
    """Weights in shards, whose index is odd."""
    weights = model / "model.safetensors"
    if weights.is_file():
        weights.replace(model / "model-00001-of-00001.safetensors")
    name = generator.choice(
        ("model-00001-of-00001.safetensors", "../x.safetensors", "/etc/hosts", "/x.safetensors", "a/b.safetensors", "x.bin",
         "none.safetensors", "model-\0.safetensors", 5, None, [], "..", "\x1b.safetensors", "n" * 300 + ".safetensors")
    )  # fmt: skip
    index: Any = {
        "metadata": generator.choice(({}, {}, None, 5, {"total_size": "x"})),
        "weight_map": {"lm_head.weight": name},
    }
    index = generator.choice((index,) * 6 + ([], {}, {"weight_map": []}, {"weight_map": {}, "metadata": {}}))
    (model / "model.safetensors.index.json").write_text(_json(index))


def _companion(generator: random.Random, model: Path) -> None:
    """A file beside the model that is odd."""
    name = generator.choice(
        ("generation_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "adapter_config.json",
         "additional_chat_templates", "preprocessor_config.json", "tokenizer.json")
    )  # fmt: skip
    path = model / name
    path.unlink(missing_ok=True)
    if generator.random() < 0.1:
        path.mkdir()
        return
    path.write_text(
        generator.choice(
            ("", "{", "[]", "{}", '{"temperature": "hot", "eos_token_id": -1}', '{"eos_token_id": 99999999999}', "[" * 5000,
             "{% for x in range(10**9) %}a{% endfor %}", "{{ ''.__class__ }}", '{"a": 1e999}', '{"base_model_name_or_path": "/x"}')
        )
    )  # fmt: skip


def _card(generator: random.Random, model: Path) -> None:
    """A base model's card with odd metadata."""
    key = generator.choice(("license", "language", "license_name", "license_link", "tags", "model-index", "datasets"))
    value = generator.choice(
        ("<script>alert(1)</script>", "2020-01-01", "1.0", "[a, [b]]", "{a: b}", "!!python/object/apply:os.system [ls]",
         "&a [*a]", "x" * 1_000_000, "|\n  two\n  lines", "no", "12:30", "9" * 6000, "'\\x1b[31m'", "[" * 3000, "mit")
    )  # fmt: skip
    (model / "README.md").write_text(f"---\n{key}: {value}\n---\n# Base\n")


def _data(generator: random.Random, material: Material, folder: Path) -> list[Any]:
    suffix = generator.choice((".txt", ".jsonl", ".json", ".csv", ".parquet", ".raw"))
    path = folder / f"{generator.choice(('data', 'da[x]ta', 'a,b', 'x*y', 'é', 'd' * 200))}{suffix}"
    path.write_bytes(_data_content(generator, material, suffix))
    recipe = folder / "recipe.toml"
    source = {"path": str(path), "column": generator.choice(("text",) * 5 + ("", "x", "\x1b", "text\n"))}
    use = generator.randrange(6)
    sections = json.loads(json.dumps(material.recipe))
    if use < 4:
        sections["data"]["train" if use < 3 else "test"] = source
        recipe.write_text(_toml(sections))
        return ["run", recipe, "--until", "prepare", "--out", folder / "out"]
    if use == 4:
        sections["evaluate"]["prompts"] = str(path)
        recipe.write_text(_toml(sections))
        return ["plan", recipe, "--out", folder / "out"]
    csv = path.with_suffix(".csv")
    path.replace(csv)
    return ["evaluate", material.run / "nothing", "--ground-truth", csv, "--encoder", "offline", "--out", folder / "e"]


def _data_content(generator: random.Random, material: Material, suffix: str) -> bytes:
    rows = [json.loads(line)["text"] for line in material.text.read_text().splitlines()[:60]]
    if suffix == ".parquet":
        return _parquet(generator, rows)
    good = {
        ".jsonl": "\n".join(json.dumps({"text": row}) for row in rows),
        ".json": json.dumps([{"text": row} for row in rows]),
        ".csv": "text,n\n" + "\n".join('"{}",1'.format(row.replace('"', '""')) for row in rows),
    }.get(suffix, "\n\n".join(rows))
    at = generator.randrange(len(good))
    return generator.choice(
        (
            lambda: good.encode(),
            lambda: good.encode("utf-16"),
            lambda: good.encode("utf-32-be"),
            lambda: b"\xef\xbb\xbf" + good.encode(),
            lambda: good.encode() + b"\xff\xfe\x80",
            lambda: good[:at].encode() + b"\xe9\xc3" + good[at:].encode(),
            lambda: good[:at].encode(),
            lambda: good[:at].encode() + b"\0" * 50 + good[at:].encode(),
            lambda: good.replace("\n", "\r").encode(),
            lambda: good.replace(" ", "\u2028").encode(),
            lambda: b"",
            lambda: b"\n" * 1000,
            lambda: generator.randbytes(5000),
            lambda: b'{"text": ' + b"[" * 5000,
            lambda: b'{"text": ' + b"9" * 6000 + b"}\n",
            lambda: json.dumps({"text": "x" * 2_000_000}).encode(),
            lambda: ("text\n" + '"' + "y" * 500_000 + '"\n').encode(),
            lambda: b'text,text\na,b\n"unclosed\n',
            lambda: b'{"text": 1}\n{"text": "a"}\n{"text": null}\n[]\n5\n',
            lambda: b"prompts,answers\na\nb,c,d,e\n",
            lambda: ("prompts,answers\n" + "a,b\n" * 5).encode(),
            lambda: b'{"text": "\\ud800 lone"}\n' * 200,
            lambda: b'{"a": {"b": {"c": 1}}}\n{"a": [1]}\n',
        )
    )()


def _parquet(generator: random.Random, rows: list[str]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    columns = generator.choice(
        ({"text": rows}, {"text": list(range(60))}, {"text": [[row] for row in rows]}, {"x": rows}, {})
    )
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    content = file.getvalue()
    at = generator.randrange(len(content))
    return generator.choice(
        (
            content,
            content[:at],
            b"PAR1" + generator.randbytes(200) + b"PAR1",
            content[:at] + b"\xff" * 8 + content[at + 8 :],
            b"PAR1",
        )
    )


def _ir(generator: random.Random, material: Material, folder: Path) -> list[Any]:
    ir = folder / generator.choice(("int4", "int4", "in[red]t4", "\x1b[2Jint4"))
    shutil.copytree(material.run / "int4", ir)
    if generator.random() < 0.5:
        (ir / "ovexport.json").unlink()
    for _ in range(generator.choice((1, 1, 2))):
        generator.choice((_xml, _xml, _xml, _bin, _manifest))(generator, ir)
    given = generator.choice(
        (
            [],
            [],
            ["--checkpoint", material.run / "checkpoint"],
            ["--checkpoint", material.run / "checkpoint", "--twin", material.run / "plain"],
            ["--twin", material.run / "plain"],
        )
    )
    command = ["verify", ir, *given, *generator.choice(([], [], ["--no-runtime"], ["--json"]))]
    return generator.choice((command,) * 6 + (["runtime", ir], ["bench", ir, "--device", "NPU"]))


def _xml(generator: random.Random, ir: Path) -> None:
    """Change the graph's text: numbers, types, names, edges, depth."""
    path = ir / "openvino_model.xml"
    text = path.read_text()
    attribute = generator.choice(
        ("shape", "element_type", "offset", "size", "type", "name", "from-layer", "from-port", "to-layer", "to-port", "id", "axis", "precision",
         "transpose_b", "version", "names", "special_zero", "variable_id", "destination_type", "auto_broadcast", "value")
    )  # fmt: skip
    values = ("", "-1", "0", "9" * 25, "nan", "f4", "u1", "Loop", "TensorIterator", "1,2,3", "9999999999,9999999999", "\u202e", "&#27;[31mPROVEN",
              "[red]x", "x" * 5000, "opset99", "string", "boolean")  # fmt: skip
    places = [at for at in _occurrences(text, f' {attribute}="')]
    change = generator.randrange(10)
    if change < 6 and places:
        begin = generator.choice(places) + len(attribute) + 3
        text = text[:begin] + generator.choice(values) + text[text.index('"', begin) :]
    elif change == 6:
        dims = _occurrences(text, "<dim>")
        begin = generator.choice(dims) + 5
        text = text[:begin] + generator.choice(("-1", "0", "9" * 19, "x")) + text[text.index("<", begin) :]
    elif change == 7:
        lines = text.splitlines(keepends=True)
        del lines[generator.randrange(len(lines))]
        text = "".join(lines)
    elif change == 8:
        text = generator.choice(
            (
                "<a>" * 100_000,
                '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "aaaa">'
                + "".join(
                    f'<!ENTITY b{n} "{"&b" + str(n - 1) + ";" if n else "&a;"}{("&b" + str(n - 1) + ";") * 9 if n else ""}">'
                    for n in range(9)
                )
                + "]><net>&b8;</net>",
                "",
                "<net></net>",
                '<net name="x" version="11"><layers/><edges/></net>',
                text.replace("<layers>", "<layers>" + "<body><layers>" * 500, 1),
            )
        )
    else:
        text = _damaged_text(generator, text)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))


def _occurrences(text: str, part: str) -> list[int]:
    found, at = [], text.find(part)
    while at >= 0:
        found.append(at)
        at = text.find(part, at + 1)
    return found


def _bin(generator: random.Random, ir: Path) -> None:
    path = ir / "openvino_model.bin"
    content = path.read_bytes()
    at = generator.randrange(len(content))
    path.write_bytes(
        generator.choice(
            (
                content[:at],
                b"",
                content + content,
                content[:at] + generator.randbytes(64) + content[at + 64 :],
                b"\xff" * len(content),
            )
        )
    )


def _manifest(generator: random.Random, ir: Path) -> None:
    path = ir / generator.choice(("ovexport.json", "ovexport_runtime.json"))
    if not path.is_file():
        path.write_text(
            generator.choice(
                ("{}", "[]", "", "{" * 5000, '{"a":' * 5000, "9" * 6000, "\0", base64.b64encode(os.urandom(0)).decode())
            )
        )
        return
    _damage_json(generator, path)


_KINDS: dict[str, Callable[[random.Random, Material, Path], list[Any]]] = {
    "recipe": _recipe,
    "model": _model,
    "data": _data,
    "ir": _ir,
}
