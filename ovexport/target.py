"""The distributions that verify, bench and runtime need on a target device: no torch, and nothing built on it.

`python -m ovexport.target` prints their requirements for pip, and imports the standard library only:

    pip install --no-deps .
    pip install $(python -m ovexport.target)
"""

import re
import sys
from importlib.metadata import requires

TARGET = (
    "click",
    "filelock",
    "numpy",
    "openvino",
    "openvino-genai",
    "openvino-tokenizers",
    "packaging",
    "pydantic",
    "rich",
    "safetensors",
    "tomli-w",
    "typer",
)


def target_requirements() -> list[str]:
    """The requirements of the target device, as ovexport's metadata has them, such as "numpy<3,>=2".

    Raises:
        PackageNotFoundError: ovexport is not installed.
    """
    by_name = {re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0]: text for text in requires("ovexport") or ()}
    return [by_name[name].replace(" ", "") for name in TARGET]


if __name__ == "__main__":
    sys.stdout.write("\n".join(target_requirements()) + "\n")
