"""Mutations of models' folders and of IRs."""

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

from fuzz_values import ODD_TEXTS, Material, damage_json, damaged_text, json_text, toml

SHARDS: tuple[Any, ...] = (
    "model-00001-of-00001.safetensors", "../x.safetensors", "/etc/hosts", "/x.safetensors", "a/b.safetensors", "x.bin",
    "none.safetensors", "model-\0.safetensors", 5, None, [], "..", "\x1b.safetensors", "n" * 300 + ".safetensors",
)  # fmt: skip
COMPANIONS = (
    "generation_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "adapter_config.json", "additional_chat_templates", "preprocessor_config.json", "tokenizer.json",
)  # fmt: skip
COMPANION_TEXTS = (
    "", "{", "[]", "{}", '{"temperature": "hot", "eos_token_id": -1}', '{"eos_token_id": 99999999999}', "[" * 5000,
    "{% for x in range(10**9) %}a{% endfor %}", "{{ ''.__class__ }}", '{"a": 1e999}',
    '{"base_model_name_or_path": "/x"}',
)  # fmt: skip
CARD_VALUES = (
    "<script>alert(1)</script>", "2020-01-01", "1.0", "[a, [b]]", "{a: b}", "!!python/object/apply:os.system [ls]",
    "&a [*a]", "x" * 1_000_000, "|\n  two\n  lines", "no", "12:30", "9" * 6000, "'\\x1b[31m'", "[" * 3000, "mit",
)  # fmt: skip
ATTRIBUTES = (
    "shape", "element_type", "offset", "size", "type", "name", "from-layer", "from-port", "to-layer", "to-port", "id",
    "axis", "precision", "transpose_b", "version", "names", "special_zero", "variable_id", "destination_type",
    "auto_broadcast", "value",
)  # fmt: skip
ATTRIBUTE_VALUES = (
    "", "-1", "0", "9" * 25, "nan", "f4", "u1", "Loop", "TensorIterator", "1,2,3", "9999999999,9999999999", "\u202e",
    "&#27;[31mPROVEN", "[red]x", "x" * 5000, "opset99", "string", "boolean",
)  # fmt: skip
ENTITIES = (
    '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY b0 "aaaaaaaaaa">'
    + "".join(f'<!ENTITY b{level} "{f"&b{level - 1};" * 10}">' for level in range(1, 9))
    + "]><net>&b8;</net>"
)
"""Entities of entities: a kilobyte that stands for a gigabyte."""


def broken_model(generator: random.Random, material: Material, folder: Path) -> list[Any]:
    name = generator.choice(("model",) * 9 + ("in[red]t4", "\x1b[2Jm"))
    model = folder / name
    shutil.copytree(material.model, model)
    for damage in dict.fromkeys(
        generator.sample(
            (_config, _config, _weights, _weights, _tokenizer, _index, _companion, _card), generator.choice((1, 1, 2))
        )
    ):
        damage(generator, model)
    if generator.random() < 0.4:
        return ["plan", "--model", model]
    recipe = folder / "recipe.toml"
    recipe.write_text(toml(material.recipe | {"model": {"id": str(model)}}))
    return [generator.choice(("plan", "compress")), recipe, "--out", folder / "out"]


def _config(generator: random.Random, model: Path) -> None:
    damage_json(generator, model / "config.json")


def _tokenizer(generator: random.Random, model: Path) -> None:
    damage_json(generator, model / generator.choice(("tokenizer.json", "tokenizer_config.json")))


def _weights(generator: random.Random, model: Path) -> None:
    """Damage the weights: values, shapes, types, names, or the file."""
    import torch
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    if not path.is_file():
        return
    content = path.read_bytes()
    change = generator.randrange(12)
    if change < 5:
        tensors = load_file(path)
        name = generator.choice(sorted(tensors))
        value = tensors[name].float()
        changed = (
            torch.full_like(value, 1e38),
            torch.full_like(value, float("nan")),
            value[:1].clone(),
            value.double() * 1e300,
            torch.zeros_like(value),
        )
        tensors[name] = changed[change]
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
    name = generator.choice(SHARDS)
    index: Any = {
        "metadata": generator.choice(({}, {}, None, 5, {"total_size": "x"})),
        "weight_map": {"lm_head.weight": name},
    }
    index = generator.choice((index,) * 6 + ([], {}, {"weight_map": []}, {"weight_map": {}, "metadata": {}}))
    (model / "model.safetensors.index.json").write_text(json_text(index))


def _companion(generator: random.Random, model: Path) -> None:
    """A file beside the model that is odd."""
    name = generator.choice(COMPANIONS)
    path = model / name
    path.unlink(missing_ok=True)
    if generator.random() < 0.1:
        path.mkdir()
        return
    path.write_text(generator.choice(COMPANION_TEXTS))


def _card(generator: random.Random, model: Path) -> None:
    """A base model's card with odd metadata."""
    key = generator.choice(("license", "language", "license_name", "license_link", "tags", "model-index", "datasets"))
    value = generator.choice(CARD_VALUES)
    (model / "README.md").write_text(f"---\n{key}: {value}\n---\n# Base\n")


def broken_ir(generator: random.Random, material: Material, folder: Path) -> list[Any]:
    ir = folder / generator.choice(("int4", "int4", "in[red]t4", "\x1b[2Jint4"))
    shutil.copytree(material.run / "int4", ir)
    if generator.random() < 0.5:
        (ir / "ovexport.json").unlink()
    for damage in dict.fromkeys(generator.sample((_xml, _xml, _xml, _bin, _manifest), generator.choice((1, 1, 2)))):
        damage(generator, ir)
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
    return generator.choice((command,) * 15 + (["runtime", ir],))


def _xml(generator: random.Random, ir: Path) -> None:
    """Change the graph's text: numbers, types, names, edges, depth."""
    path = ir / "openvino_model.xml"
    text = path.read_text()
    attribute = generator.choice(ATTRIBUTES)
    places = _occurrences(text, f' {attribute}="')
    change = generator.randrange(10)
    if change < 6 and places:
        begin = generator.choice(places) + len(attribute) + 3
        text = text[:begin] + generator.choice(ATTRIBUTE_VALUES) + text[text.index('"', begin) :]
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
                ENTITIES,
                "",
                "<net></net>",
                '<net name="x" version="11"><layers/><edges/></net>',
                text.replace("<layers>", "<layers>" + "<body><layers>" * 500, 1),
            )
        )
    else:
        text = damaged_text(generator, text)
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
        path.write_text(generator.choice(("{}", "[]", "", "{" * 5000, '{"a":' * 5000, "9" * 6000, "\0")))
        return
    damage_json(generator, path)
