"""Odd values and damaged documents, which the mutations are made of."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ODD_TEXTS = (
    "", " ", "\n", "\0", "\x1b[2J\x1b[31mPROVEN", "\u202eabc", "\ufeff", "\U0001f600", "a" * 300, "ä" * 200, "../" * 30,
    "/etc/passwd", "/dev/zero", "[red]x[/red]", "[/]", "%s%n", "${HOME}", "a/b/c", "-1", "nan", "*", "[", "{}", "\r\n",
    "<script>", "C:\\x", "offline", "hf://x/y", "https://[", "x" * 5000,
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, -(10**30), 0.0, -0.5, 1e-320, 1e308, 1e999,
    -1e999,
    float("nan"), [], {}, [[]], [None], {"a": 1}, ["x"] * 50, [1, "2", 3.0], *ODD_TEXTS,
)  # fmt: skip

PLAUSIBLE: tuple[Any, ...] = (
    1, 2, 3, 5, 7, 15, 16, 17, 64, 128, 1000, 10**5, 10**6, 10**9, 0, 0.5, 0.999, 1e-30, 1e-3, 1e30, True, False, "cpu",
    "auto", "float32", "task", "int4_sym", "int8", "fq_lora_nls", [1], [64, 32], [8, 4, 2], "short", "f32",
    "smaller_group",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Material:
    """What the cases are mutations of: a model's folder, a finished run of it, a recipe's sections and a text."""

    model: Path
    run: Path
    recipe: dict[str, Any]
    text: Path


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def toml(value: Any) -> str:
    """TOML of anything, what can't be in it included."""
    lines: list[str] = []
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


def damaged_text(generator: random.Random, text: str) -> str:
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


def damage_json(generator: random.Random, path: Path) -> None:
    """Change a value somewhere in a JSON file, or its text."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return
    if generator.random() < 0.25:
        path.write_bytes(damaged_text(generator, text[:200_000]).encode("utf-8", "surrogateescape"))
        return
    place = values
    while isinstance(place, dict) and place:
        key = generator.choice(list(place))
        if isinstance(place[key], dict) and place[key] and generator.random() < 0.7:
            place = place[key]
            continue
        place[key] = generator.choice((*ODD_VALUES, nested(2000)))
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
    path.write_text(json_text(values), encoding="utf-8", errors="surrogatepass")


def json_text(value: Any) -> str:
    """JSON of anything, however deep."""
    depth = 0
    while isinstance(value, list) and len(value) == 1:
        value, depth = value[0], depth + 1
    if depth:
        return "[" * depth + json_text(value) + "]" * depth
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {json_text(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)
