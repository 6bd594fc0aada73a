"""The upload of a run's product to the hub; errors of huggingface_hub are translated here, once."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from huggingface_hub.utils import logging as hub_logging

import ovexport
from ovexport.artifacts import MODELS, RUN_FILES, RunFolder
from ovexport.errors import ArtifactError, RecipeError, VerificationFailed
from ovexport.gates.judging import require_passed
from ovexport.recipe import VerifySpec
from ovexport.reports import GateReport, VerificationReport
from ovexport.storage.digests import check_files
from ovexport.storage.records import read_record

logger = logging.getLogger(__name__)

_BRANCH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A model repository of the hub.

    Attributes:
        repository: as ORG/NAME; it is made where there is none.
        revision: the branch, made where there is none; the main one without it.
        private: make a new repository private.
        allow_partial: upload a product that is only partly proven too.

    Raises:
        RecipeError: the repository or the branch can't have that name.
    """

    repository: str
    revision: str | None = None
    private: bool = False
    allow_partial: bool = False

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repository)
        except HFValidationError:
            named = False
        else:
            named = self.repository.count("/") == 1
        if not named:
            raise RecipeError(
                f"--push-to-hub {self.repository!r}: no repository's name; give ORG/NAME, in letters, digits, '-', '_' "
                "and '.', 96 at most"
            )
        if self.revision is not None and (not _BRANCH.fullmatch(self.revision) or ".." in self.revision):
            raise RecipeError(f"--revision {self.revision!r}: no branch's name; give one such as int4")

    def __str__(self) -> str:
        return f"--push-to-hub {self.repository}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """What was uploaded; `commit` is the one that holds it."""

    repository: str
    commit: str
    url: str


def check_proof(destination: Destination, proof: VerifySpec) -> None:
    """Refuse, before any work is done, a recipe whose product will not be proven as the upload needs it.

    Raises:
        RecipeError: it will be only partly proven, and that is not allowed.
    """
    if not (proof.runtime or destination.allow_partial):
        raise RecipeError(
            "verify.runtime = false: leaves the product partly proven, and only what is proven is uploaded; set it to "
            "true, or add --allow-partial"
        )


def check_destination(destination: Destination) -> None:
    """Refuse, before any work is done, an upload that can be seen to fail.

    Raises:
        ArtifactError: HF_HUB_OFFLINE is set, there is no token, the hub can't be reached, or it refuses the token.
    """
    with _translated(destination, f"or leave it out and upload later with --resume {destination}"):
        token = get_token()
        if is_offline_mode():
            raise _Unable("HF_HUB_OFFLINE is set, so nothing can be uploaded", "unset it")
        if token is None:
            raise _Unable("there is no token for the hub", _LOG_IN)
        try:
            account = HfApi(token=token).whoami()
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise
            logger.debug("who the token is of can't be told (%s)", error)
            return
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise _Unable("the token may only read", _LOG_IN)


def upload(folder: RunFolder, destination: Destination, *, show_progress: bool = False) -> Upload:
    """Upload a finished run's product in one commit: the IR at the top, so that a download is what LLMPipeline loads,
    with the card, the page, the recipe and the reports beside it.

    Args:
        show_progress: draw huggingface_hub's bars on stderr.

    Raises:
        VerificationFailed: the product was not proven, or only partly where that is not allowed.
        GateFailed: a figure misses its limit.
        RecipeError: the repository is to be private, and there is a public one.
        ArtifactError: the run is not finished, the product is not as it was verified, or the hub can't be reached or
            refuses.
    """
    report = read_record(folder.path / "verification.json", VerificationReport)
    _require_proven(folder, report, destination)
    files = _files(folder, report)
    megabytes = sum(path.stat().st_size for path in files.values()) / 1e6
    logger.info("uploading %d files, %.1f MB, to %s", len(files), megabytes, destination.repository)
    api = HfApi(token=get_token(), library_name="ovexport", library_version=ovexport.__version__)
    with (
        _translated(destination, f"the run is whole, so try again with --resume {destination}"),
        _library_quiet(show_progress),
    ):
        api.create_repo(destination.repository, private=destination.private or None, exist_ok=True)
        if destination.private and not api.model_info(destination.repository).private:
            raise RecipeError(
                f"--private: {destination.repository} is there and public; make it private on the hub, or leave "
                "--private out"
            )
        if destination.revision is not None:
            api.create_branch(destination.repository, branch=destination.revision, exist_ok=True)
        commit = api.create_commit(
            destination.repository,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()],
            commit_message=f"INT4 OpenVINO IR, {report.heading.lower()} by ovexport {ovexport.__version__}",
            revision=destination.revision,
        )
    return Upload(repository=destination.repository, commit=commit.oid, url=str(commit.repo_url))


def _require_proven(folder: RunFolder, report: VerificationReport, destination: Destination) -> None:
    """Refuse what is not proven.

    Raises:
        VerificationFailed: the proof failed, or is partial where that is not allowed.
    """
    if not report.passed:
        raise VerificationFailed(
            f"{folder.path}: its verification failed, so it is not uploaded; verification.json says why", report
        )
    if report.verdict != "proven" and not destination.allow_partial:
        raise VerificationFailed(
            f"{folder.path}: {report.heading.lower()} ({report.summary.reason}), so it is not uploaded; mend that and "
            "--resume, or add --allow-partial",
            report,
        )


def _files(folder: RunFolder, report: VerificationReport) -> dict[str, Path]:
    """What is uploaded, by its path in the repository: the files of the product that were verified, and the run's.

    Raises:
        GateFailed: a figure misses its limit.
        ArtifactError: the product is not as it was verified.
    """
    if folder.gates.is_file():
        require_passed(read_record(folder.gates, GateReport))
    product = folder.ir(MODELS[-1]).path
    changed = check_files(report.files, product)
    if changed:
        raise ArtifactError(f"{product}: {', '.join(changed)}: not as verified; ovexport run --resume makes it again")
    files = {name: product / name for name in report.files}
    return files | {name: folder.path / name for name in RUN_FILES if (folder.path / name).is_file()}


class _Unable(Exception):
    """Why an upload can't be done, and the cure."""


@contextmanager
def _translated(destination: Destination, again: str) -> Iterator[None]:
    """Turn every error of the hub and of the network into one line.

    Args:
        again: how to try once more.

    Raises:
        ArtifactError: with the reason, its cure and `again`.
    """
    try:
        yield
    except (_Unable, httpx.HTTPError, HFValidationError, OSError, RuntimeError) as error:  # RuntimeError is Xet's
        problem, cure = error.args if isinstance(error, _Unable) else _described(error)
        raise ArtifactError(f"{destination}: {problem}; {cure}; {again}") from error


def _described(error: Exception) -> tuple[str, str]:
    """What went wrong, and what cures it."""
    refusal = _in_chain(error, HfHubHTTPError)
    if isinstance(refusal, HfHubHTTPError):
        return _refusal(refusal.response.status_code, refusal.server_message or "")
    if _in_chain(error, httpx.TransportError) or _in_chain(error, ConnectionError):
        return f"the hub at {HfApi().endpoint} can't be reached ({_first_line(error)})", "check the network"
    return f"the upload failed ({_first_line(error)})", "look at the network and at HF_ENDPOINT"


def _refusal(status: int, message: str) -> tuple[str, str]:
    said = f"{status}: {' '.join(message.split())}" if message else str(status)
    if status == 401:
        return f"the hub does not know the token ({said})", _LOG_IN
    if status == 403:
        return f"the token may not write there ({said})", "use a token that may, or another ORG"
    if status == 429 or status >= 500:
        return f"the hub failed ({said})", "wait a while"
    return f"the hub refused it ({said})", "look at the repository's settings and limits there"


def _in_chain(error: BaseException | None, error_type: type[Exception]) -> BaseException | None:
    """The error, or the nearest of those that caused it, that is of a type."""
    while error is not None and not isinstance(error, error_type):
        error = error.__cause__ or error.__context__
    return error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _library_quiet(show_progress: bool) -> Iterator[None]:
    """huggingface_hub's bars only where they are asked for, its warnings as lines of ours, its other messages not."""
    verbosity, drawn = hub_logging.get_verbosity(), not are_progress_bars_disabled()
    hub_logging.set_verbosity_error()
    if not show_progress:
        disable_progress_bars()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            yield
        for warning in caught:
            logger.warning("%s", " ".join(str(warning.message).split()))
    finally:
        hub_logging.set_verbosity(verbosity)
        if drawn:
            enable_progress_bars()
