"""What every benchmark's command line has in common, and where its result goes."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from provenance import provenance
from tables import MEASURED, RESULTS

from ovexport.storage.files import write_text


def parser(description: str | None, name: str, quick: str) -> argparse.ArgumentParser:
    """--quick, --json and --save.

    Args:
        name: of the benchmark, and of its file under benchmarks/results.
        quick: what --quick does.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the table")
    made.add_argument("--save", action="store_true", help=f"write benchmarks/results/{name}.json too")
    return made


def publish(
    document: dict[str, Any],
    name: str,
    options: argparse.Namespace,
    case: str | None = None,
    recipe: Path | None = None,
) -> None:
    """Save the document with its provenance where that was asked for, and print it or its table.

    Args:
        case: what was measured, where a benchmark has a file for each.
        recipe: that was carried out, where one was.
    """
    document = document | {"provenance": provenance(Path(sys.argv[0]), recipe, quick=options.quick)}
    text = json.dumps(document, indent=2)
    if options.save:
        write_text(text + "\n", RESULTS / (f"{name}-{case}.json" if case else f"{name}.json"))
    print(json.dumps(document) if options.json else MEASURED[name](document))
