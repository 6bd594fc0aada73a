"""How the graphs inside an If, a Loop or a TensorIterator are bound to what is around them."""

from dataclasses import dataclass
from typing import Any

import openvino as ov

from ovexport.errors import UnsupportedModelError
from ovexport.openvino.graph import bodies

_INPUTS = {
    "InvariantInputDescription": (),
    "MergedInputDescription": (),
    "SliceInputDescription": ("start", "stride", "part_size", "end", "axis"),
}
_OUTPUTS = {
    "BodyOutputDescription": ("iteration",),
    "ConcatOutputDescription": ("start", "stride", "part_size", "end", "axis"),
}


@dataclass(frozen=True, slots=True)
class Ports:
    """A graph inside an operation, and what goes in and out of it.

    Attributes:
        roles: by name of each of its parameters, what it is fed with, by the operation's input.
        outcomes: names of its results and assignments, with what becomes of each.
    """

    graph: ov.Model
    roles: dict[str, str]
    outcomes: tuple[tuple[str, str], ...]

    @property
    def ends(self) -> tuple[str, ...]:
        """The names of its results and assignments, each once."""
        return tuple(dict.fromkeys(name for name, _ in self.outcomes))


def ports(operation: Any) -> tuple[Ports, ...]:
    """The graphs inside an operation; none for most.

    Raises:
        UnsupportedModelError: they can't be looked at, or are bound in a way that is not known.
    """
    return tuple(_bound(operation, index, body) for index, body in enumerate(bodies(operation)))


def _bound(operation: Any, index: int, body: ov.Model) -> Ports:
    type_name, name = operation.get_type_name(), operation.get_friendly_name()
    which = (index,) if type_name == "If" else ()
    parameters = [node.get_name() for node in body.get_parameters()]
    results = [node.get_name() for node in body.get_results()]
    roles: dict[str, str] = {}
    outcomes: list[tuple[str, str]] = []
    for place, entry in enumerate(operation.get_input_descriptions(*which)):
        role = f"input {entry.input_index} {_told(entry, _INPUTS, name)}"
        role += f" {place}" if role in roles.values() else ""
        roles[parameters[entry.body_parameter_index]] = role
        if type(entry).__name__ == "MergedInputDescription":
            outcomes.append((results[entry.body_value_index], f"back to {role}"))
    for entry in operation.get_output_descriptions(*which):
        told = f"output {entry.output_index} {_told(entry, _OUTPUTS, name)}"
        outcomes.append((results[entry.body_value_index], told))
    if type_name == "Loop":
        iteration, condition = operation.get_special_body_ports()
        if iteration >= 0:
            roles[parameters[iteration]] = "the iteration"
        if condition >= 0:
            outcomes.append((results[condition], "the condition"))
    outcomes += [(node.get_name(), "state") for node in body.get_sinks()]
    unfed = [parameter for parameter in parameters if parameter not in roles]
    if unfed:
        raise UnsupportedModelError(f"{name}: a parameter of the graph inside this {type_name} is fed by nothing")
    return Ports(body, roles, tuple(outcomes))


def _told(entry: Any, known: dict[str, tuple[str, ...]], name: str) -> str:
    """A description's type and fields, in words.

    Raises:
        UnsupportedModelError: it is of a type that is not known.
    """
    type_name = type(entry).__name__
    if type_name not in known:
        raise UnsupportedModelError(
            f"{name}: the graph inside it is bound by a {type_name}, which the proof does not know"
        )
    return " ".join((type_name, *(f"{field} {getattr(entry, field)}" for field in known[type_name])))
