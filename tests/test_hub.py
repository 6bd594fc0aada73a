"""Uploads to a hub on this machine: what arrives, and what each refusal says."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import openvino_genai
import pytest
from command_line import ovexport, started
from fake_hub import TOKEN, FakeHub, serving
from huggingface_hub import ModelCard, constants, snapshot_download

from ovexport import __version__
from ovexport.artifacts import IR, RUN_FILES, RunFolder
from ovexport.errors import ArtifactError, GateFailed, OvexportError, RecipeError, VerificationFailed
from ovexport.publish import Destination, check_destination, check_proof, upload
from ovexport.recipe import VerifySpec
from ovexport.reports import GateReport, GateResult, VerificationReport
from ovexport.storage.digests import file_digest
from ovexport.storage.files import files_in
from ovexport.storage.records import write_record
from ovexport.verify import verify

REPOSITORY = "org/storyteller-int4"
THERE = Destination(repository=REPOSITORY)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving() as served:
        yield served


@pytest.fixture
def online(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The hub, where this process finds it, with a token."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def push(run: RunFolder, *options: str | Path) -> CompletedProcess[str]:
    """`ovexport run --resume --push-to-hub`, as a user types it."""
    return ovexport("run", run.recipe, "--out", run.path, "--resume", "--push-to-hub", REPOSITORY, *options)


def contents(run: RunFolder) -> dict[str, str]:
    """The run's files, but for the log that tells of every command."""
    return {str(file): file_digest(file) for file in files_in(run.path) if file.name != "run.log"}


def expected(run: RunFolder) -> dict[str, bytes]:
    product = run.ir("int4").path
    files = {file.relative_to(product).as_posix(): file.read_bytes() for file in files_in(product)}
    return files | {name: (run.path / name).read_bytes() for name in RUN_FILES if (run.path / name).is_file()}


def refused(error: pytest.ExceptionInfo[OvexportError]) -> str:
    line = str(error.value)
    assert "\n" not in line
    return line


def test_a_finished_run_is_uploaded_whole_and_its_download_generates(
    run_copy: RunFolder, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run_copy)
    settings = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    options = ("--resume", "--push-to-hub", REPOSITORY, "--private", "--json")
    done = started("run", run_copy.recipe, "--out", run_copy.path, *options, **settings)
    assert done.returncode == 0, done.stderr
    stored = hub.branches[REPOSITORY, "main"]
    assert stored == expected(run_copy)
    assert {"openvino_model.xml", "README.md", "report.html", "recipe.toml", "benchmark.json"} <= set(stored)
    assert len(hub.commits) == 1
    assert hub.private[REPOSITORY]
    uploaded = json.loads(done.stdout)["upload"]
    assert uploaded == {"repository": REPOSITORY, "commit": hub.sha(), "url": f"{hub.url}/{REPOSITORY}"}
    assert contents(run_copy) == before

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = Path(snapshot_download(REPOSITORY, endpoint=hub.url, token=TOKEN, cache_dir=tmp_path / "cache"))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == stored
    assert verify(IR(folder), runtime=False).passed
    text = openvino_genai.LLMPipeline(str(folder), "CPU").generate(["Lily went"], max_new_tokens=4).texts[0]
    original = openvino_genai.LLMPipeline(str(run_copy.ir("int4").path), "CPU")
    assert text == original.generate(["Lily went"], max_new_tokens=4).texts[0]
    assert ModelCard.load(folder / "README.md").data.library_name == "openvino"


def test_a_download_is_proven_with_the_run_files_beside_it(run_copy: RunFolder) -> None:
    product = run_copy.ir("int4").path
    for name in RUN_FILES:
        if (run_copy.path / name).is_file():
            (product / name).write_bytes((run_copy.path / name).read_bytes())
    (product / ".gitattributes").touch()
    (product / ".cache" / "huggingface").mkdir(parents=True)
    (product / ".cache" / "huggingface" / "CACHEDIR.TAG").touch()
    assert verify(IR(product), twin=run_copy.ir("plain"), runtime=False).passed
    (product / "config.py").touch()
    assert not verify(IR(product), runtime=False).passed


def test_what_the_hub_remarks_on_the_card_is_passed_on(
    finished_run: RunFolder, online: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    upload(finished_run, THERE)
    remarks = [record.message for record in caplog.records if record.name == "ovexport.publish"]
    assert remarks == ["Warnings while validating metadata in README.md: - no license is named"]


def test_a_second_upload_sends_only_what_changed(run_copy: RunFolder, online: FakeHub) -> None:
    upload(run_copy, THERE)
    (run_copy.path / "report.html").write_text("another page")
    online.requests.clear()
    upload(run_copy, THERE)
    assert online.branches[REPOSITORY, "main"]["report.html"] == b"another page"
    assert not [request for request in online.requests if request.startswith("PUT")]
    assert len(online.commits) == 2


def test_a_branch_and_a_private_repository(run_copy: RunFolder, online: FakeHub) -> None:
    upload(run_copy, Destination(repository=REPOSITORY, revision="int4/first", private=True))
    assert online.private[REPOSITORY] is True
    assert online.branches[REPOSITORY, "int4/first"] == expected(run_copy)
    assert online.branches[REPOSITORY, "main"] == {}


def test_what_is_to_be_private_is_not_sent_to_a_public_repository(run_copy: RunFolder, online: FakeHub) -> None:
    online.make(REPOSITORY)
    with pytest.raises(RecipeError, match="is there and public") as error:
        upload(run_copy, Destination(repository=REPOSITORY, private=True))
    refused(error)
    assert online.branches[REPOSITORY, "main"] == {}


@pytest.mark.parametrize("name", ["storyteller", "a/b/c", "org/", "org/na me", "org/a--b", "org/x.git", ""])
def test_a_name_that_no_repository_can_have_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="give ORG/NAME") as error:
        Destination(repository=name)
    refused(error)


@pytest.mark.cli
def test_a_bad_name_and_options_that_need_another_are_refused_before_any_work(tmp_path: Path, online: FakeHub) -> None:
    nothing = RunFolder(tmp_path / "run")
    for options, says in (
        (("--push-to-hub", "storyteller"), "give ORG/NAME"),
        (("--until", "verify"), "a whole run alone is uploaded"),
        (("--revision", "a b"), "no branch's name"),
    ):
        done = push(nothing, *options)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert says in done.stderr
    for option in (("--private",), ("--revision", "int4"), ("--allow-partial",)):
        done = ovexport("run", nothing.recipe, "--out", nothing.path, *option)
        assert (done.returncode, done.stderr) == (2, f"error: {option[0]}: goes with --push-to-hub ORG/NAME; add it\n")
    assert not nothing.path.exists()
    assert online.requests == []


@pytest.mark.parametrize(
    ("constant", "says"), [("HF_HUB_OFFLINE", "HF_HUB_OFFLINE is set"), ("ENDPOINT", "can't be reached")]
)
def test_no_network_is_seen_before_any_work(
    finished_run: RunFolder,
    online: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    constant: str,
    says: str,
) -> None:
    value = {"HF_HUB_OFFLINE": True, "ENDPOINT": f"http://127.0.0.1:{_closed_port()}"}[constant]
    monkeypatch.setattr(constants, constant, value)
    done = push(finished_run, "--out", tmp_path / "new")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
    assert says in done.stderr
    assert f"--resume --push-to-hub {REPOSITORY}" in done.stderr
    assert not (tmp_path / "new").exists()


def test_tokens_that_can_not_write_are_seen_before_any_work(
    online: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_destination(THERE)
    online.role = "read"
    with pytest.raises(ArtifactError, match="may only read; log in") as error:
        check_destination(THERE)
    refused(error)
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(ArtifactError, match=r"does not know the token \(401") as error:
        check_destination(THERE)
    refused(error)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ArtifactError, match="there is no token") as error:
        check_destination(THERE)
    refused(error)


def test_a_hub_that_does_not_tell_who_the_token_is_of_stops_nothing(online: FakeHub) -> None:
    online.failures["whoami"] = 503
    check_destination(THERE)


@pytest.mark.parametrize(
    ("request_", "status", "says"),
    [
        ("repos/create", 401, "does not know the token"),
        ("repos/create|GET /api/models", 403, "the token may not write there"),
        ("repos/create", 500, "the hub failed (500"),
        ("validate-yaml", 500, "the hub failed (500"),
        ("PUT /large", 403, "the token may not write there"),
        ("/commit/", 500, "the hub failed (500"),
        ("/commit/", 413, "the hub refused it (413"),
    ],
)
def test_a_refused_upload_is_one_line_and_leaves_the_run(
    finished_run: RunFolder, online: FakeHub, request_: str, status: int, says: str
) -> None:
    online.failures[request_] = status
    before = contents(finished_run)
    with pytest.raises(ArtifactError) as error:
        upload(finished_run, THERE)
    line = refused(error)
    assert says in line
    assert line.endswith(f"try again with --resume --push-to-hub {REPOSITORY}")
    assert contents(finished_run) == before
    assert online.commits == []
    online.failures.clear()
    upload(finished_run, THERE)
    assert online.branches[REPOSITORY, "main"] == expected(finished_run)


def test_a_connection_that_breaks_off_is_one_line(
    finished_run: RunFolder, online: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{_closed_port()}")
    with pytest.raises(ArtifactError, match="can't be reached") as error:
        upload(finished_run, THERE)
    refused(error)


def test_the_command_shows_the_figures_though_the_upload_is_refused(run_copy: RunFolder, online: FakeHub) -> None:
    online.failures["repos/create|GET /api/models"] = 403
    before = contents(run_copy)
    done = push(run_copy)
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == done.stderr.splitlines()[-1:]
    assert "the token may not write there (403" in done.stderr
    assert "KL from BF16, mean, nats" in done.stdout
    assert contents(run_copy) == before


def test_what_is_not_proven_is_not_uploaded(run_copy: RunFolder, online: FakeHub) -> None:
    path = run_copy.path / "verification.json"
    report = VerificationReport.model_validate_json(path.read_bytes())
    write_record(report.model_copy(update={"passed": False}), path)
    with pytest.raises(VerificationFailed, match="its verification failed"):
        upload(run_copy, THERE)
    write_record(report, path)
    missed = GateResult(
        gate="similarity>=2", metric="similarity", operator=">=", limit=2, value=1, margin=-1, passed=False
    )
    write_record(GateReport(passed=False, gates=(missed,)), run_copy.gates)
    with pytest.raises(GateFailed, match="similarity"):
        upload(run_copy, THERE)
    run_copy.gates.unlink()
    (run_copy.ir("int4").path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json: not as verified"):
        upload(run_copy, THERE)
    path.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        upload(run_copy, THERE)
    assert online.requests == []


def test_what_is_partly_proven_is_uploaded_only_where_that_is_allowed(run_copy: RunFolder, online: FakeHub) -> None:
    path = run_copy.path / "verification.json"
    report = VerificationReport.model_validate_json(path.read_bytes())
    summary = report.summary.model_copy(update={"reason": "the runtime was not checked"})
    write_record(report.model_copy(update={"summary": summary}), path)
    with pytest.raises(VerificationFailed, match=r"partly proven \(the runtime was not checked\).*--allow-partial"):
        upload(run_copy, THERE)
    assert online.requests == []
    upload(run_copy, Destination(repository=REPOSITORY, allow_partial=True))
    assert online.commits == [f"INT4 OpenVINO IR, partly proven by ovexport {__version__}"]
    write_record(report.model_copy(update={"passed": False}), path)
    with pytest.raises(VerificationFailed, match="its verification failed"):
        upload(run_copy, Destination(repository=REPOSITORY, allow_partial=True))


def test_a_recipe_that_leaves_the_proof_partial_is_refused_before_any_work() -> None:
    check_proof(THERE, VerifySpec())
    check_proof(Destination(repository=REPOSITORY, allow_partial=True), VerifySpec(runtime=False))
    with pytest.raises(RecipeError, match=r"verify\.runtime = false.*--allow-partial") as error:
        check_proof(THERE, VerifySpec(runtime=False))
    refused(error)


def _closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
