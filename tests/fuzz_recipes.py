"""Mutations of recipes, command lines and files of text."""

import io
import json
import random
from pathlib import Path
from typing import Any

from fuzz_values import ODD_TEXTS, ODD_VALUES, PLAUSIBLE, Material, damaged_text, nested, toml

from ovexport.recipe import Recipe


def broken_recipe(generator: random.Random, material: Material, folder: Path) -> list[Any]:
    sections = json.loads(json.dumps(material.recipe))
    for _ in range(generator.choice((0, 1, 1, 1, 1, 2))):
        _mutate(generator, sections)
    text = toml(sections)
    text = damaged_text(generator, text) if generator.random() < 0.15 else text
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
    values = sections.get(section)
    keys = [*(values if isinstance(values, dict) else ()), "seed", "x"]
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
        values[key] = nested(generator.choice((1, 30, 70, 200)))
    elif change == 4:
        values[key] = generator.choice(ODD_VALUES)
    else:
        known = Recipe.model_fields[section].annotation if section in Recipe.model_fields else None
        key = generator.choice(list(getattr(known, "model_fields", values)))
        values[key] = generator.choice(ODD_TEXTS if isinstance(values.get(key), str) else PLAUSIBLE)


def broken_data(generator: random.Random, material: Material, folder: Path) -> list[Any]:
    suffix = generator.choice((".txt", ".jsonl", ".json", ".csv", ".parquet", ".raw"))
    path = folder / f"{generator.choice(('data', 'da[x]ta', 'a,b', 'x*y', 'é', 'd' * 200))}{suffix}"
    path.write_bytes(_data_content(generator, material, suffix))
    recipe = folder / "recipe.toml"
    source = {"path": str(path), "column": generator.choice(("text",) * 5 + ("", "x", "\x1b", "text\n"))}
    use = generator.randrange(6)
    sections = json.loads(json.dumps(material.recipe))
    if use < 4:
        sections["data"]["train" if use < 3 else "test"] = source
        recipe.write_text(toml(sections))
        return ["run", recipe, "--until", "prepare", "--out", folder / "out"]
    if use == 4:
        sections["evaluate"]["prompts"] = str(path)
        recipe.write_text(toml(sections))
        return ["plan", recipe, "--out", folder / "out"]
    csv = path.with_suffix(".csv")
    path.replace(csv)
    given = ["--ground-truth", csv, "--encoder", "offline", "--max-new-tokens", "2", "--out", folder / "e"]
    return ["evaluate", material.run / "int4", *given]


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
            good.encode,
            lambda: good.encode("utf-16"),
            lambda: good.encode("utf-32-be"),
            lambda: b"\xef\xbb\xbf" + good.encode(),
            lambda: good.encode() + b"\xff\xfe\x80",
            lambda: good[:at].encode() + b"\xe9\xc3" + good[at:].encode(),
            good[:at].encode,
            lambda: good[:at].encode() + b"\0" * 50 + good[at:].encode(),
            lambda: good.replace("\n", "\r").encode(),
            lambda: good.replace(" ", "\u2028").encode(),
            lambda: b"",
            lambda: b"\n" * 1000,
            lambda: generator.randbytes(5000),
            lambda: b'{"text": ' + b"[" * 5000,
            lambda: b'{"text": ' + b"9" * 6000 + b"}\n",
            lambda: json.dumps({"text": "x" * 2_000_000}).encode(),
            ("text\n" + '"' + "y" * 500_000 + '"\n').encode,
            lambda: b'text,text\na,b\n"unclosed\n',
            lambda: b'{"text": 1}\n{"text": "a"}\n{"text": null}\n[]\n5\n',
            lambda: b"prompts,answers\na\nb,c,d,e\n",
            ("prompts,answers\n" + "a,b\n" * 5).encode,
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
