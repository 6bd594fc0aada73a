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
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai
from numpy.typing import NDArray

from ovexport.artifacts import IR
from ovexport.bench.rounds import Round, ratio, run_round
from ovexport.errors import ArtifactError, UnsupportedModelError, last_line
from ovexport.openvino.graph import read_graph
from ovexport.openvino.runtime import PIECE_TOKENS, LogitsRunner, compile_for_cpu, properties
from ovexport.openvino.runtime_settings import (
    CARRIED,
    SETTINGS_FILE,
    read_xml_text,
    settings_report,
    with_settings,
    without_settings,
)
from ovexport.openvino.token_divergence import Comparator
from ovexport.progress import Listener, Progress, silent
from ovexport.recipe import BenchSpec, GridPoint
from ovexport.reports import Ratio, RuntimeTrial, SettingsReport, WrittenSettings
from ovexport.storage.files import files_in, write_text
from ovexport.storage.scratch import scratch_folder
from ovexport.versions import stack_versions

Settings = Mapping[str, Any]

SESSIONS, ROUNDS = 2, 4
FINAL_SESSIONS, FINAL_ROUNDS = 8, 5
GROUPS = (32, 64, 128)
_SURELY = 0.98
_DEFAULTS, _TRIED = "defaults", "tried"


def search_settings(
    ir: IR,
    spec: BenchSpec,
    prompt: Sequence[int],
    tokens: NDArray[np.int64],
    *,
    kl_limit_nats: float,
    listener: Listener = silent,
) -> SettingsReport:
    """Find the settings and try what of them the IR can carry; the folder is left as it is.

    Args:
        spec: the first point of its grid is timed.
        prompt: token ids, at least `spec.prompt_tokens[0]` of them.
        tokens: text that the divergence is measured on, (sequences, length).
        kl_limit_nats: settings that take the model farther from itself at full precision are not kept.

    Raises:
        ArtifactError: the tokens are of another vocabulary, or the IR's file was changed after an earlier search.
        UnsupportedModelError: the IR can't be loaded, or nothing can be written into it.
    """
    if ir.adapter is not None:
        raise UnsupportedModelError(
            f"{ir.path}: has an adapter beside it, with which no settings are searched; absorb the adapter "
            '(compress.method = "fq_lora") first'
        )
    with _as_converted(ir) as converted:
        text = read_xml_text(converted)
        with_settings(text, {}, precise=True)  # refuses at once what could not be written in the end
        search = Search(
            ir=converted,
            point=spec.points[0],
            prompt=prompt,
            tokens=tokens,
            kl_limit_nats=kl_limit_nats,
            seed=spec.seed,
            listener=listener,
            exact=LogitsRunner(read_graph(converted), str(ir.path)),
        )
        if tokens.max() >= search.exact.vocabulary:
            raise ArtifactError(f"{ir.path}: the text holds token {tokens.max()}, which is not of its vocabulary")
        defaults = properties(compile_for_cpu(read_graph(converted), str(ir.path), {}))
        _descend(search, defaults)
        chosen, gain = _confirmed(search)
        carried = _carried(search, chosen, text)
        conditions = _conditions(search, defaults)
    return SettingsReport(
        trials=tuple(search.trials),
        kl_limit_nats=kl_limit_nats,
        chosen=chosen,
        gain=gain,
        written=carried.written if carried else None,
        written_gain=carried.gain if carried else None,
        written_kl_mean_nats=carried.kl_mean_nats if carried else None,
        not_written=_not_written(chosen, carried),
        conditions=conditions,
        versions=stack_versions(),
    )


def _not_written(chosen: Mapping[str, str], carried: "_Carried | None") -> dict[str, str]:
    """The chosen settings that the IR does not carry."""
    if carried is None:
        return dict(chosen)
    written = {*CARRIED, *(["INFERENCE_PRECISION_HINT"] if carried.written.matmul_precision else [])}
    return {name: value for name, value in chosen.items() if name not in written}


def _conditions(search: "Search", defaults: Mapping[str, str]) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "prompt_tokens": search.point.prompt_tokens,
        "output_tokens": search.point.output_tokens,
        "text_tokens": int(search.tokens.size),
        "device_name": ov.Core().get_property("CPU", "FULL_DEVICE_NAME"),
        "defaults": defaults,
        "defaults_kl_mean_nats": search.divergence(search.ir, {}),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Times:
    """Ratios of the tried pipeline's times over the plain one's."""

    first_token: Ratio
    output_token: Ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class _Carried:
    """What an IR can carry, and what a plain pipeline of it gains and costs."""

    written: WrittenSettings
    gain: Ratio
    kl_mean_nats: float


@dataclass(slots=True, kw_only=True)
class Search:
    """An IR, what it is timed and measured with, and the trials so far; `exact` runs it at full precision."""

    ir: IR
    point: GridPoint
    prompt: Sequence[int]
    tokens: NDArray[np.int64]
    kl_limit_nats: float
    seed: int
    listener: Listener
    exact: LogitsRunner
    trials: list[RuntimeTrial] = field(default_factory=list)

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
        times = None
        try:
            kl = self._kl_of(written)
            within = kl <= self.kl_limit_nats
            if within:
                times = self.timed(self.ir.path, settings, sessions=SESSIONS, rounds=ROUNDS)
        except (RuntimeError, UnsupportedModelError) as error:
            reason = f"the runtime refuses it: {last_line(error)}"
            self.trials.append(RuntimeTrial(settings=written, kept=False, reason=reason))
            return
        self.trials.append(
            RuntimeTrial(
                settings=written,
                time_per_output_token=times.output_token if times else None,
                time_to_first_token=times.first_token if times else None,
                kl_mean_nats=kl,
                kept=within,
                reason=None if within else f"diverges by more than {self.kl_limit_nats:g} nats; not timed",
            )
        )
        self.listener(Progress(task="runtime settings tried", done=len(self.trials), total=len(self.trials) + 1))

    def _kl_of(self, settings: Mapping[str, str]) -> float:
        """The divergence under settings of the device; neither backend nor threads are in it."""
        device = {name: value for name, value in settings.items() if name not in _NOT_OF_NUMBERS}
        for trial in self.trials:
            known = {name: value for name, value in trial.settings.items() if name not in _NOT_OF_NUMBERS}
            if known == device and trial.kl_mean_nats is not None:
                return trial.kl_mean_nats
        return self.divergence(self.ir, device)

    def divergence(self, candidate: IR, settings: Settings) -> float:
        """Mean KL divergence in nats of an IR under settings from the searched one at full precision."""
        approximate = LogitsRunner(read_graph(candidate), str(candidate.path), settings)
        comparator = Comparator(self.exact.vocabulary)
        divergences = []
        for row in self.tokens[:, None]:
            both = (runner.pieces(row, PIECE_TOKENS) for runner in (self.exact, approximate))
            for expected, actual in zip(*both, strict=True):
                divergences.append(comparator(expected, actual, np.zeros(expected.shape[:2], np.int64)).kl)
        return float(np.concatenate(divergences, axis=1).mean())

    def timed(self, folder: Path, settings: Settings, *, sessions: int, rounds: int) -> _Times:
        """Time a plain pipeline of the IR in turn with one of a folder under settings.

        Each round's prompt begins with another token, so that no cache of former prompts is of use.
        """
        times: dict[str, list[list[Round]]] = {_DEFAULTS: [], _TRIED: []}
        shift = 0
        for session in range(sessions):
            both = {_DEFAULTS: _pipeline(self.ir.path, {}), _TRIED: _pipeline(folder, settings)}
            for at in times.values():
                at.append([])
            for index in range(rounds + 1):
                shift += 1
                tokens = np.roll(np.asarray(self.prompt[: self.point.prompt_tokens], np.int64), shift)[None]
                order = (_DEFAULTS, _TRIED) if (session + index) % 2 else (_TRIED, _DEFAULTS)
                for name, one in run_round(both, order, tokens, self.point).items():
                    if index:
                        times[name][-1].append(one)
            del both
            gc.collect()

        def over(figure: str) -> Ratio:
            of = {
                name: [[getattr(one, figure) for one in session] for session in rounds_of_sessions]
                for name, rounds_of_sessions in times.items()
            }
            return ratio(of[_TRIED], of[_DEFAULTS], self.seed)

        return _Times(first_token=over("first_token_ms"), output_token=over("output_token_ms"))


_NOT_OF_NUMBERS = ("ATTENTION_BACKEND", "INFERENCE_NUM_THREADS")


def _descend(search: Search, defaults: Mapping[str, str]) -> None:
    """Try the settings one after the other, each on top of the best so far."""
    capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precisions = ["f32", *(name for name in ("bf16", "f16") if {"bf16": "BF16", "f16": "FP16"}[name] in capabilities)]
    usual = defaults.get("INFERENCE_PRECISION_HINT")
    for precision, group in product([None, *(name for name in precisions if name != usual)], [None, 0, *GROUPS]):
        runs_in = precision or usual
        if group is not None and (runs_in == "bf16" or str(group) == defaults.get("DYNAMIC_QUANTIZATION_GROUP_SIZE")):
            continue
        given = {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
        search.attempt({name: value for name, value in given.items() if value is not None})
    for precision in ("u8", "u4", "f16", "bf16"):
        if precision != defaults.get("KV_CACHE_PRECISION"):
            search.attempt(search.best() | {"KV_CACHE_PRECISION": precision})
    for backend in ("SDPA", "PA"):
        search.attempt(search.best() | {"ATTENTION_BACKEND": backend})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for threads in sorted({max(1, cores // 2), cores}):
        if str(threads) != defaults.get("INFERENCE_NUM_THREADS"):
            search.attempt(search.best() | {"INFERENCE_NUM_THREADS": threads})


def _confirmed(search: Search) -> tuple[dict[str, str], Ratio | None]:
    """The best settings, timed once more and for longer; none, where the defaults may be as fast."""
    best = search.best()
    if not best:
        return {}, None
    times = search.timed(search.ir.path, best, sessions=FINAL_SESSIONS, rounds=FINAL_ROUNDS)
    return (best, times.output_token) if _surely_faster(times.output_token) else ({}, None)


def _surely_faster(ratio: Ratio) -> bool:
    """Whether the whole interval is below 1."""
    return ratio.ci95 is not None and ratio.ci95[1] < 1


def _carried(search: Search, chosen: Mapping[str, str], text: str) -> _Carried | None:
    """What of the settings the IR can carry, where a plain LLMPipeline of the folder is the faster for it."""
    options = {name: chosen[name] for name in CARRIED if name in chosen}
    precise = chosen.get("INFERENCE_PRECISION_HINT") == "f32"
    if not (options or precise):
        return None
    edited, written = with_settings(text, options, precise=precise)
    with _copy_with(search.ir, edited) as carrying:
        kl = search.divergence(carrying, {})
        times = search.timed(carrying.path, {}, sessions=FINAL_SESSIONS, rounds=FINAL_ROUNDS)
    if not _surely_faster(times.output_token) or kl > search.kl_limit_nats:
        return None
    return _Carried(written=written, gain=times.output_token, kl_mean_nats=kl)


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
    with scratch_folder(ir.path.parent) as scratch:
        copy = IR(scratch / ir.path.name)
        for file in files_in(ir.path):
            if file.name not in (ir.xml.name, SETTINGS_FILE):
                target = copy.path / file.relative_to(ir.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(file, target)
        write_text(text, copy.xml)
        yield copy


def _link(file: Path, target: Path) -> None:
    try:
        target.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, target)


def _pipeline(folder: Path, settings: Settings) -> openvino_genai.LLMPipeline:
    try:
        return openvino_genai.LLMPipeline(str(folder), "CPU", **settings)
    except RuntimeError as error:
        raise UnsupportedModelError(f"{folder}: openvino-genai can't load it ({last_line(error)})") from error
