"""The exception tree. A message names the thing, the value and the cure; each class has one exit code.

OvexportError                       exit code
├── RecipeError                     2   usage or recipe
├── MissingDependencyError          3   an optional package is not installed
├── PlugInError                     3   code of somebody else's that a recipe names fails
├── ArtifactError                   4   a file is missing, corrupt or of another run
├── UnsupportedModelError           5   the model can't be done
├── DataError                       5   the text can't be used
├── OutOfMemory                     5   this machine has too little memory for it
├── TuningDivergedError             6   the loss is not finite
├── VerificationFailed              7   the IR is not what was tuned
└── GateFailed                      8   a measured figure misses its limit
"""

from typing import Any


def last_line(error: BaseException) -> str:
    """What a foreign error says at its end, where OpenVINO's says what matters; its type, where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class OvexportError(Exception):
    """Base of every error a user can cause and cure; the command line prints its message and no traceback."""

    exit_code = 1


class RecipeError(OvexportError):
    """A recipe or a command line that can't be carried out."""

    exit_code = 2


class MissingDependencyError(OvexportError):
    """A package is needed and not installed; the message holds the pip line."""

    exit_code = 3


class PlugInError(OvexportError):
    """A plug-in that a recipe names can't be imported, or raised an error; the message names the plug-in."""

    exit_code = 3


class ArtifactError(OvexportError):
    """A file of a run is missing, corrupt or belongs to another run."""

    exit_code = 4


class UnsupportedModelError(OvexportError):
    """A model, or one of its layers, that can't be loaded, compressed or converted."""

    exit_code = 5


class DataError(OvexportError):
    """Text that can't be read, or too little of it."""

    exit_code = 5


class OutOfMemory(OvexportError):
    """Host or device memory is too small for the work as it was asked for."""

    exit_code = 5


class TuningDivergedError(OvexportError):
    """The loss became infinite or not a number; the last good checkpoint is kept."""

    exit_code = 6


class VerificationFailed(OvexportError):
    """The IR failed a check.

    Attributes:
        report: the VerificationReport with every check.
    """

    exit_code = 7

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report


class GateFailed(OvexportError):
    """A measured figure misses its limit.

    Attributes:
        report: the GateReport with every gate.
    """

    exit_code = 8

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report
