"""The best runtime settings of an IR on this machine: those that take least time per output token, among those that
leave the model's distributions where they are.

Every trial is timed in turn with a plain `LLMPipeline(folder, "CPU")`, pair by pair. What it costs is the KL divergence
from the same IR at full precision, on text that is fed in pieces, so that the KV cache is read. A setting is fixed
before the next one is tried: inference precision together with dynamic quantization, which does nothing in bfloat16,
then the KV cache's precision, the attention backend and the threads.
"""

import gc
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai
from numpy.typing import NDArray

from ovexport.artifacts import IR, files_in, write_text
from ovexport.bench.loading import backend_settings
from ovexport.bench.rounds import Round, ratio, run_round
from ovexport.carried import CARRIED, SETTINGS_FILE, read_xml_text, settings_report, with_settings, without_settings
from ovexport.comparator import Comparator
from ovexport.errors import UnsupportedModelError
from ovexport.graph import read_graph
from ovexport.progress import Listener, Progress, silent
from ovexport.recipe import BenchSpec, GridPoint
from ovexport.reports import Ratio, RuntimeTrial, SettingsReport, WrittenSettings
from ovexport.runtime import ACCURATE, LogitsRunner, properties
from ovexport.versions import stack_versions

Settings = Mapping[str, Any]

_SESSIONS, _ROUNDS = 2, 4
_FINAL_SESSIONS, _FINAL_ROUNDS = 8, 5
_PIECE_TOKENS = 32
_GROUPS = (32, 64, 128)
_SURELY = 0.98
_DEFAULTS, _TRIED = "defaults", "tried"


@dataclass(slots=True)
class _Search:
    """An IR, what it is timed and measured with, and what was found so far."""

    ir: IR
    point: GridPoint
    prompt: Sequence[int]
    tokens: NDArray[np.int64]
    kl_limit: float
    seed: int
    listener: Listener
    trials: list[RuntimeTrial] = field(default_factory=list)
    divergences: dict[tuple[tuple[str, str], ...], float] = field(default_factory=dict)

    def best(self) -> dict[str, str]:
        """The fastest settings of those that are kept, none at first; slower by less than what a few pairs can tell
        apart, earlier and fewer settings are preferred."""
        best: dict[str, str] = {}
        least = 1.0
        for trial in self.trials:
            if trial.kept and trial.time_per_output_token and trial.time_per_output_token.median < _SURELY * least:
                best, least = trial.settings, trial.time_per_output_token.median
        return best

    def attempt(self, settings: Settings) -> None:
        """Try settings, unless they were tried before."""
        written = {name: str(value) for name, value in settings.items()}
        if not settings or any(trial.settings == written for trial in self.trials):
            return
        try:
            kl = self.divergence(settings)
            within = kl <= self.kl_limit
            times = self._timed(settings) if within else None
        except (RuntimeError, UnsupportedModelError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            self.trials.append(RuntimeTrial(settings=written, kept=False, reason=f"the runtime refuses it: {reason}"))
            return
        self.trials.append(
            RuntimeTrial(
                settings=written,
                time_per_output_token=times and times.output_token,
                time_to_first_token=times and times.first_token,
                kl_mean_nats=kl,
                kept=within,
                reason=None if within else f"diverges by more than {self.kl_limit:g} nats; not timed",
            )
        )
        self.listener(Progress(task="runtime settings tried", done=len(self.trials), total=len(self.trials) + 1))

    def _timed(self, settings: Settings) -> "_Times":
        return paired(self.ir.path, self.ir.path, settings, self, sessions=_SESSIONS, rounds=_ROUNDS)

    def divergence(self, settings: Settings) -> float:
        """Mean KL divergence in nats of the IR under settings from itself at full precision."""
        device = {name: value for name, value in settings.items() if name != "ATTENTION_BACKEND"}
        key = tuple(sorted((name, str(value)) for name, value in device.items() if name != "INFERENCE_NUM_THREADS"))
        if key not in self.divergences:
            self.divergences[key] = divergence(self.ir, self.ir, device, self.tokens)
        return self.divergences[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Times:
    """Ratios of the second's times over the first's."""

    first_token: Ratio
    output_token: Ratio


def search_settings(
    ir: IR,
    spec: BenchSpec,
    prompt: Sequence[int],
    tokens: NDArray[np.int64],
    *,
    kl_limit: float,
    listener: Listener = silent,
) -> SettingsReport:
    """Find the settings and try what of them the IR can carry; the folder is left as it is.

    Args:
        spec: the first point of its grid is timed.
        prompt: token ids, at least `spec.prompt_tokens[0]` of them.
        tokens: text that the divergence is measured on, (sequences, length).
        kl_limit: settings that take the model farther from itself at full precision, in nats, are not kept.

    Raises:
        UnsupportedModelError: the IR can't be loaded.
    """
    with _as_converted(ir) as plain:
        found = _Search(plain, spec.points[0], prompt, tokens, kl_limit, spec.seed, listener)
        defaults = properties(ov.Core().compile_model(read_graph(plain), "CPU"))
        _descend(found, defaults)
        chosen, gain = _confirmed(found)
        written, written_gain, written_kl = _carried(found, chosen)
    carried = {name for name in chosen if name in CARRIED} if written else set()
    if written and written.matmul_precision:
        carried |= {"INFERENCE_PRECISION_HINT"}
    return SettingsReport(
        trials=tuple(found.trials),
        kl_limit_nats=kl_limit,
        chosen={name: str(value) for name, value in chosen.items()},
        gain=gain,
        written=written,
        written_gain=written_gain,
        written_kl_mean_nats=written_kl,
        not_written={name: str(value) for name, value in chosen.items() if name not in carried},
        conditions={
            "prompt_tokens": found.point.prompt_tokens,
            "output_tokens": found.point.output_tokens,
            "text_tokens": int(tokens.size),
            "device_name": ov.Core().get_property("CPU", "FULL_DEVICE_NAME"),
            "defaults": defaults,
            "defaults_kl_mean_nats": found.divergence({}),
        },
        versions=stack_versions(),
    )


def _descend(found: _Search, defaults: Mapping[str, str]) -> None:
    """Try the settings one after the other, each on top of the best so far."""
    capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precisions = ["f32", *(name for name in ("bf16", "f16") if {"bf16": "BF16", "f16": "FP16"}[name] in capabilities)]
    usual = defaults.get("INFERENCE_PRECISION_HINT")
    for precision, group in product([None, *(name for name in precisions if name != usual)], [None, 0, *_GROUPS]):
        runs_in = precision or usual
        if group is not None and (runs_in == "bf16" or str(group) == defaults.get("DYNAMIC_QUANTIZATION_GROUP_SIZE")):
            continue
        given = {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
        found.attempt({name: value for name, value in given.items() if value is not None})
    for precision in ("u8", "u4", "f16", "bf16"):
        if precision != defaults.get("KV_CACHE_PRECISION"):
            found.attempt(found.best() | {"KV_CACHE_PRECISION": precision})
    for backend in ("SDPA", "PA"):
        found.attempt(found.best() | {"ATTENTION_BACKEND": backend})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for threads in sorted({max(1, cores // 2), cores}):
        if str(threads) != defaults.get("INFERENCE_NUM_THREADS"):
            found.attempt(found.best() | {"INFERENCE_NUM_THREADS": threads})


def _confirmed(found: _Search) -> tuple[dict[str, Any], Ratio | None]:
    """The best settings, timed once more and for longer; none, where the defaults may be as fast."""
    best = found.best()
    if not best:
        return {}, None
    path = found.ir.path
    times = paired(path, path, best, found, sessions=_FINAL_SESSIONS, rounds=_FINAL_ROUNDS)
    return (best, times.output_token) if times.output_token.ci95[1] < 1 else ({}, times.output_token)


def _carried(found: _Search, chosen: Mapping[str, Any]) -> tuple[WrittenSettings | None, Ratio | None, float | None]:
    """What of the settings the IR can carry, where a plain LLMPipeline of the folder is the faster for it."""
    options = {name: str(chosen[name]) for name in CARRIED if name in chosen}
    precise = chosen.get("INFERENCE_PRECISION_HINT") == "f32"
    if not (options or precise):
        return None, None, None
    edited, written = with_settings(read_xml_text(found.ir), options, precise=precise)
    with _copy_with(found.ir, edited) as carrying:
        kl = divergence(carrying, found.ir, {}, found.tokens)
        times = paired(found.ir.path, carrying.path, {}, found, sessions=_FINAL_SESSIONS, rounds=_FINAL_ROUNDS)
    faster = times.output_token.ci95[1] < 1 and kl <= found.kl_limit
    return (written if faster else None), times.output_token, kl


@contextmanager
def _as_converted(ir: IR) -> Iterator[IR]:
    """The IR without settings that an earlier search wrote into it."""
    report = settings_report(ir)
    if report is None or report.written is None:
        yield ir
        return
    with _copy_with(ir, without_settings(read_xml_text(ir), report.written)) as copy:
        yield copy


@contextmanager
def _copy_with(ir: IR, text: str) -> Iterator[IR]:
    """A folder like the IR's, its files linked, with another text of the graph."""
    with TemporaryDirectory(dir=ir.path.parent, prefix=".ovexport-") as folder:
        for file in files_in(ir.path):
            if file.name not in (ir.xml.name, SETTINGS_FILE):
                target = Path(folder) / file.relative_to(ir.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(file, target)
        copy = IR(Path(folder))
        write_text(text, copy.xml)
        yield copy


def _link(file: Path, target: Path) -> None:
    try:
        target.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, target)


def divergence(candidate: IR, reference: IR, settings: Settings, tokens: NDArray[np.int64]) -> float:
    """Mean KL(reference at full precision ‖ candidate under settings) in nats."""
    exact = LogitsRunner(read_graph(reference), str(reference.path), ACCURATE)
    approximate = LogitsRunner(read_graph(candidate), str(candidate.path), settings)
    comparator = Comparator(exact.vocabulary)
    found = []
    for row in tokens[:, None]:
        both = (runner.pieces(row, _PIECE_TOKENS) for runner in (exact, approximate))
        for expected, actual in zip(*both, strict=True):
            found.append(comparator(expected, actual, np.zeros(expected.shape[:2], np.int64)).kl)
    return float(np.concatenate(found, axis=1).mean())


def paired(plain: Path, tried: Path, settings: Settings, found: _Search, *, sessions: int, rounds: int) -> _Times:
    """Time a plain pipeline of one folder in turn with one of another folder under settings.

    Each round's prompt begins with another token, so that no cache of former prompts is of use.
    """
    times: dict[str, list[list[Round]]] = {_DEFAULTS: [], _TRIED: []}
    count = 0
    for session in range(sessions):
        both = {_DEFAULTS: _pipeline(plain, {}), _TRIED: _pipeline(tried, settings)}
        for at in times.values():
            at.append([])
        for index in range(rounds + 1):
            count += 1
            tokens = np.roll(np.asarray(found.prompt[: found.point.prompt_tokens], np.int64), count)[None]
            order = (_DEFAULTS, _TRIED) if (session + index) % 2 else (_TRIED, _DEFAULTS)
            for name, one in run_round(both, order, tokens, found.point).items():
                if index:
                    times[name][-1].append(one)
        del both
        gc.collect()

    def over(figure: str) -> Ratio:
        by_model = [[[getattr(one, figure) for one in at] for at in times[name]] for name in (_TRIED, _DEFAULTS)]
        return ratio(by_model[0], by_model[1], found.seed)

    return _Times(first_token=over("first_token"), output_token=over("output_token"))


def _pipeline(folder: Path, settings: Settings) -> openvino_genai.LLMPipeline:
    given = dict(settings)
    given |= backend_settings(given["ATTENTION_BACKEND"]) if "ATTENTION_BACKEND" in given else {}
    return openvino_genai.LLMPipeline(str(folder), "CPU", **given)
