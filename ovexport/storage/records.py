"""JSON records that cross a file boundary: strict, frozen, written whole."""

from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ovexport.errors import ArtifactError
from ovexport.storage.bounded import parse_json
from ovexport.storage.files import write_text
from ovexport.storage.textfile import read_text, split_lines


class Record(BaseModel):
    """Base of what crosses a file boundary as JSON: strict and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    def with_values(self, **values: Any) -> Self:
        """The record with other values of some fields, checked as those of a new one."""
        return type(self)(**(dict(self) | values))


AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


def read_record(path: Path, record_type: type[AnyRecord]) -> AnyRecord:
    """Read and check a JSON record.

    Raises:
        ArtifactError: the file is missing, or is not such a record.
    """
    try:
        return record_type.model_validate_json(read_text(path))
    except FileNotFoundError:
        raise ArtifactError(
            f"{path}: missing; give the folder that holds it, or run the stage that writes it"
        ) from None
    except (OSError, ValueError) as error:
        reason = _first_problem(error) if isinstance(error, ValidationError) else str(error).splitlines()[-1]
        raise ArtifactError(f"{path}: not a {record_type.__name__} ({reason}); make it again") from error


def _first_problem(error: ValidationError) -> str:
    """What a record is refused for; its version comes first, and other versions have other fields."""
    first = error.errors()[0]
    if first["loc"] == ("format_version",):
        return f"another version of ovexport wrote it, in format {first['input']}"
    return first["msg"]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line; a line that a kill cut short is left out, and no file holds none."""
    lines = split_lines(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else []
    objects = []
    for line in lines:
        with suppress(ValueError, TypeError):
            objects.append(dict(parse_json(line)))
    return objects


def write_record(record: BaseModel, path: Path) -> None:
    """Write a JSON record atomically."""
    write_text(record.model_dump_json(indent=2) + "\n", path)
