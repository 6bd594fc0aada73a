"""Names of a graph's operations that are the same every time the graph is made.

OpenVINO names an operation that nobody named by its type and a number that counts all operations the process made so
far, so that the same export is other bytes when something else ran before it. The file alone is edited.
"""

import re
from pathlib import Path
from xml.etree import ElementTree

_MADE_UP = re.compile(r"([A-Z][A-Za-z0-9]*)_\d+(\.\d+)?")
_MADE_UP_OF_GRAPH = re.compile(r"Model\d+")


def name_nodes(xml: Path) -> None:
    """Number the operations of an .xml that have no name of their own in the order in which they stand in it."""
    tree = ElementTree.parse(xml)
    names: dict[str, str] = {}

    def stable(name: str) -> str:
        made_up = _MADE_UP.fullmatch(name)
        return names.setdefault(name, f"{made_up[1]}_{len(names)}") if made_up else name

    root = tree.getroot()
    if _MADE_UP_OF_GRAPH.fullmatch(root.get("name", "")):
        root.set("name", xml.stem)
    for layer in root.iter("layer"):
        layer.set("name", stable(layer.get("name", "")))
        for element in (layer, *layer.iter("port")):
            for attribute in ("names", "output_names"):
                if attribute in element.attrib:
                    element.set(attribute, ",".join(stable(name) for name in element.get(attribute, "").split(",")))
    tree.write(xml, encoding="utf-8", xml_declaration=True)
