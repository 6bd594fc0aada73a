"""The tables of README.md and benchmarks/README.md, from the committed results: no figure is typed by hand.

python benchmarks/tables.py            write the tables
python benchmarks/tables.py --check    exit 1 if a table is not the committed result, or if the script or the recipe of
                                       a result has changed since it was measured
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from provenance import REPOSITORY, stale_sources

from ovexport.artifacts import RunFolder
from ovexport.bench.formats import course
from ovexport.report.table import Findings, comparison, read_findings
from ovexport.reports import EvaluationReport
from ovexport.storage.records import read_record

RESULTS = REPOSITORY / "benchmarks" / "results"
README = REPOSITORY / "README.md"
BENCHMARKS_README = REPOSITORY / "benchmarks" / "README.md"
DEMO = RESULTS / "demo"
MODELS = (DEMO, RESULTS / "wikilm-16m-distill", RESULTS / "babyllama-105-distill")
CENTRES = ("median", "ratio_of_means", "ratio_of_medians")
"""What a ratio can be: of pairs the median, or one of means or medians."""


def whole_way_table(result: Path) -> str:
    """What benchmarks/whole_way.py measured: the whole table of a run."""
    findings = read_findings(RunFolder(result))
    names, rows = comparison(findings)
    lines = ["| |" + "".join(f" {name} |" for name in names), "|---|" + "---:|" * len(names)]
    lines += [f"| {row.figure.strip()} |" + "".join(f" {value} |" for value in row.values) for row in rows]
    return "\n".join([*lines, "", _conditions(result, findings), *_other_text(result, names)])


def _other_text(result: Path, names: Sequence[str]) -> Iterator[str]:
    """The figures on a second text, where one was measured."""
    path = result / "other_text.json"
    if not path.is_file():
        return
    report = read_record(path, EvaluationReport)
    conditions, models = report.conditions, report.models.values()
    yield ""
    yield (
        f"The same models on {conditions['documents']} documents of {conditions['text']} "
        f"({conditions['test_sequences']} x {conditions['sequence_length']} tokens):"
    )
    yield ""
    yield f"| |{''.join(f' {name} |' for name in names)}"
    yield "|---|" + "---:|" * len(names)
    yield "| perplexity per token |" + "".join(f" {model.perplexity:.3f} |" for model in models)
    shown = [_kl(model.kl_mean_nats, model.kl_standard_error_nats) for model in models]
    yield f"| KL from {names[0]}, mean ± standard error, nats |" + "".join(f" {one} |" for one in shown)
    yield "| same likeliest token |" + "".join(
        " – |" if model.same_top1 is None else f" {model.same_top1:.2%} |" for model in models
    )


def _kl(mean: float | None, error: float | None) -> str:
    return "–" if mean is None or error is None else f"{mean:.5f} ± {error:.5f}"


def models_table() -> str:
    """A line per model."""
    lines = [
        "| recipe | weights, MB | group size | KL from BF16, rounded to nearest, nats | not tuned, nats | tuned, nats "
        "| recovered (95 %) | same likeliest token, tuned | time per token over BF16 (95 %) | checks passed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_model_row(result, read_findings(RunFolder(result))) for result in MODELS]
    return "\n".join(lines)


def _model_row(result: Path, findings: Findings) -> str:
    name = result.name
    evaluation, proof, benchmark = findings.evaluation, findings.verification, findings.benchmark
    assert evaluation is not None, name
    assert proof is not None, name
    assert benchmark is not None, name
    speed = benchmark.ratios["int4/bf16"].time_per_output_token
    plain, tuned = evaluation.models["plain"], evaluation.models["int4"]
    nearest = json.loads((result / "nearest.json").read_text(encoding="utf-8"))
    low, high = nearest["recovered_gap_ci95"] or (float("nan"), float("nan"))
    groups = sorted({layer.group_size for layer in proof.layers if layer.element_type == "u4"})
    passed = sum(check.passed for check in proof.checks)
    sizes = [benchmark.models[model].weight_bytes / 1e6 for model in ("bf16", "int4")]
    cells = (
        f"[{name}](pipelines/{name}.toml)",
        f"{sizes[0]:.1f} → {sizes[1]:.1f}",
        "–".join(str(size) for size in dict.fromkeys((groups[0], groups[-1]))),
        f"{nearest['kl_mean_nats']:.5f} ± {nearest['kl_standard_error_nats']:.5f}",
        f"{plain.kl_mean_nats:.5f} ± {plain.kl_standard_error_nats:.5f}",
        f"{tuned.kl_mean_nats:.5f} ± {tuned.kl_standard_error_nats:.5f}",
        f"{nearest['recovered_gap']:.0%} ({low:.0%}–{high:.0%})",
        f"{tuned.same_top1:.1%}",
        _spread(speed.model_dump()),
        f"{passed} of {len(proof.checks)}",
    )
    return "| " + " | ".join(cells) + " |"


def _conditions(result: Path, findings: Findings) -> str:
    name = result.name
    evaluation, benchmark = findings.evaluation, findings.benchmark
    assert evaluation is not None, name
    assert benchmark is not None, name
    seconds = json.loads((result / "seconds.json").read_text())
    tested, timed = evaluation.conditions, benchmark.conditions
    runtime = timed["runtime"]["int4"]
    return (
        f"{timed['device_name']}, {runtime['INFERENCE_NUM_THREADS']} threads; latency with "
        f"{timed['prompt_tokens']} prompt and {timed['output_tokens']} output tokens, {course(benchmark)}, "
        f"inference in {runtime['INFERENCE_PRECISION_HINT']}, "
        f"KV cache {runtime['KV_CACHE_PRECISION']}; "
        f"quality in f32 over {tested['test_sequences']} x {tested['sequence_length']} held-out tokens and "
        f"{tested['prompts']} prompts, encoder {tested['encoder']}; openvino {benchmark.versions['openvino']}. "
        f"The whole run took {sum(seconds.values()):.0f} s, tuning {seconds['tune']:.0f} s of them."
    )


def _spread(ratio: dict[str, Any] | None, form: str = ".2f") -> str:
    """A ratio, its centre named by what it is, with its 95 % interval or its range in brackets where it has one."""
    if ratio is None:
        return "–"
    centre = next(ratio[name] for name in CENTRES if name in ratio)
    ends = ratio.get("ci95") or ratio.get("range")
    return format(centre, form) + (f" ({ends[0]:{form}}–{ends[1]:{form}})" if ends else "")


def reliability_table(document: dict[str, Any]) -> str:
    """What benchmarks/reliability.py counted."""
    lines = [
        "| damage | trials | found | found without ovexport.json | found with ovexport.json forged "
        "| operation or tensor named | file named | not found, same codes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for damage, count in document["counts"].items():
        part = "–" if count["part_named"] is None else count["part_named"]
        cells = (count["trials"], *count["found"].values(), part, count["file_named"], count["same_codes"])
        lines.append(f"| {damage} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def exactness_table(document: dict[str, Any]) -> str:
    """What benchmarks/exactness.py found."""
    lines = [
        "| between tuning and the IR | INT4 codes that differ | INT8 codes that differ | scales that differ "
        "| largest difference of a logit, as a share of the logits' range |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, difference in document["differences"].items():
        figures = [difference[key] for key in ("int4_codes", "int8_codes", "scales")]
        shares = [f"{share:.2%}" if share else "0" for share in figures]
        lines.append(f"| {name} | {' | '.join(shares)} | {difference['logits']:.1e} |")
    return "\n".join(lines)


def convert_table(document: dict[str, Any]) -> str:
    """What benchmarks/convert.py measured: medians over its rounds."""
    lines = ["| | seconds | peak RSS, MB | RssAnon, MB |", "|---|---:|---:|---:|"]
    for side, figures in document["figures"].items():
        seconds, peak, anonymous = (float(median(values)) for values in figures.values())
        lines.append(f"| {side} | {seconds:.1f} | {peak / 1e6:.0f} | {anonymous / 1e6:.0f} |")
    return "\n".join(lines)


def verify_table(document: dict[str, Any]) -> str:
    """What benchmarks/verify.py measured."""
    lines = [
        "| rank of the adapters | GB of packed weights per second and core | SHA-256 of the base, s | RssAnon, MB |",
        "|---:|---:|---:|---:|",
    ]
    for rank, figures in document["figures"].items():
        growth = figures["rss_anon_growth_bytes"] / 1e6
        speed, digests = figures["gigabytes_per_second"], figures["digest_seconds"]
        lines.append(f"| {rank} | {speed:.2f} | {digests:.2f} | {growth:.0f} |")
    return "\n".join(lines)


def divergence_table(document: dict[str, Any]) -> str:
    """What benchmarks/divergence.py measured."""
    ratio = next(iter(document["ratios"].values()))
    conditions, seconds = document["conditions"], document["seconds"]
    growth = {int(tokens): size / 1e6 for tokens, size in document["rss_anon_growth_bytes"].items()}
    lines = [
        "| two forward passes, s | with the divergence, s | ratio (95 %) | "
        + " | ".join(f"RssAnon over {tokens} tokens, MB" for tokens in growth)
        + " |",
        "|" + "---:|" * (3 + len(growth)),
        f"| {seconds['forward']:.2f} | {seconds['compare']:.2f} "
        f"| {_spread(ratio)} | " + " | ".join(f"{size:.0f}" for size in growth.values()) + " |",
    ]
    return "\n".join(lines) + (
        f"\n\nRandom weights, hidden size {conditions['hidden_size']}, {conditions['layers']} layers, vocabulary "
        f"{conditions['vocabulary']}; {conditions['tokens']} tokens, {conditions['pairs']} pairs of runs."
    )


def settings_table(document: dict[str, Any]) -> str:
    """What benchmarks/settings.py found."""

    lines = [
        "| settings | time per output token, ratio to the defaults | KL from full precision, nats |",
        "|---|---:|---:|",
    ]
    for trial in document["trials"]:
        kl = trial["kl_mean_nats"]
        name = ", ".join(f"{key} {value}" for key, value in trial["settings"].items())
        shown = "–" if kl is None else f"{kl:.6f}"
        lines.append(f"| {name} | {_spread(trial['time_per_output_token'])} | {shown} |")
    conditions = document["conditions"]
    shape = conditions["shape"]
    defaults = ", ".join(
        f"{name} {conditions['defaults'][name]}"
        for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
    )
    best = ", ".join(f"{name} {value}" for name, value in document["chosen"].items()) or "the defaults"
    timed = [trial["time_per_output_token"] for trial in document["trials"] if trial["time_per_output_token"]]
    reasons = " or ".join(sorted({ratio["reason"] for ratio in timed if ratio["ci95"] is None}))
    without = f"The ratios in the table are medians without an interval ({reasons}). " if reasons else ""
    return "\n".join(lines) + (
        f"\n\n{without}Best settings: {best}. Timed again for longer, their ratio is {_spread(document['gain'])}; "
        f"written into the IR and run by a default LLMPipeline, it is {_spread(document['written_gain'])}. "
        f"{conditions['device_name']}, {conditions['defaults']['INFERENCE_NUM_THREADS']} threads; its defaults are "
        f"{defaults} (KL {conditions['defaults_kl_mean_nats']:.6f}); random weights, hidden size "
        f"{shape['hidden_size']}, "
        f"{shape['layers']} layers, {conditions['mode']}; {conditions['prompt_tokens']} prompt and "
        f"{conditions['output_tokens']} output tokens."
    )


LATENCY_NAMES = {
    "bf16": "BF16",
    "plain": "INT4, not tuned",
    "int4": "INT4, adapters absorbed",
    "static": "INT4 and runtime adapters, static",
    "dynamic": "INT4 and runtime adapters, dynamic",
}


def latency_table(document: dict[str, Any]) -> str:
    """What benchmarks/latency.py measured: a line per form of the model."""
    lines = [
        "| | time to first token, ms | ratio absorbed / this (95 %) | time per output token, ms "
        "| ratio absorbed / this (95 %) | weights, MB | peak memory, MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, title in LATENCY_NAMES.items():
        one = document["models"][name]
        cells = [title]
        for figure in ("time_to_first_token", "time_per_output_token"):
            ratio = document["ratios"].get(f"{figure} int4/{name}")
            cells += [f"{one[f'{figure}_ms']['median']:.1f}", _spread(ratio)]
        peak = one["peak_rss_bytes"]
        cells += [f"{one['weight_bytes'] / 1e6:.0f}", f"{peak / 1e6:.0f}" if peak else "–"]
        lines.append(f"| {' | '.join(cells)} |")
    conditions = document["conditions"]
    shape, threads = conditions["shape"], conditions["runtime"]["int4"]["INFERENCE_NUM_THREADS"]
    lines += [
        "",
        f"{conditions['device_name']}, {threads} threads; random weights, hidden size {shape['hidden_size']}, "
        f"{shape['layers']} layers; rank {conditions['compress']['rank']}; {conditions['prompt_tokens']} prompt and "
        f"{conditions['output_tokens']} output tokens; {conditions['pairs']} interleaved rounds in "
        f"{conditions['sessions']} sessions.",
    ]
    return "\n".join(lines)


def forms_table(document: dict[str, Any]) -> str:
    """What benchmarks/forms.py measured: a line per form of the adapter."""
    latency, conditions = document["latency"], document["latency"]["conditions"]
    lines = [
        "| the adapter is | KL from beside, nats (95 %) | same likeliest token | time to first token, ms "
        "| time per output token, ms | ratio absorbed / this (95 %) | weights, MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in latency["models"].items():
        apart = document["divergence"].get(name)
        low, high = (apart and apart["kl_mean_ci95"]) or (float("nan"), float("nan"))
        ratio = latency["ratios"].get(f"absorbed/{name}")
        cells = [
            name,
            f"{apart['kl_mean_nats']:.5f} ({low:.5f}–{high:.5f})" if apart else "0",
            f"{apart['same_top1']:.2%}" if apart else "100%",
            *(f"{one[f'{figure}_ms']['median']:.2f}" for figure in ("time_to_first_token", "time_per_output_token")),
            _spread(ratio and ratio["time_per_output_token"]),
            f"{one['weight_bytes'] / 1e6:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    compress, steps = document["conditions"]["compress"]["beside"], document["conditions"]["steps"]
    lines += [
        "",
        f"{conditions['device_name']}; rank {compress['rank']}, init {compress['init']}; {steps['beside']} steps of "
        f"the adapter, {steps['absorbed']} of the absorbed form; {conditions['prompt_tokens']} prompt and "
        f"{conditions['output_tokens']} output tokens, {conditions['pairs']} interleaved rounds.",
    ]
    return "\n".join(lines)


def quality_table(document: dict[str, Any]) -> str:
    """What benchmarks/quality.py measured: the best first, and marked where a figure is a tie with the first's."""
    lines = [
        "| INT4 made by | KL from BF16, nats (95 %) | KL of rounding recovered (95 %) | perplexity "
        "| same likeliest token | similarity |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows = {name: row for name, row in document["rows"].items() if "kl_mean_nats" in row}
    for name in sorted(rows, key=lambda name: float(rows[name]["kl_mean_nats"])):
        row = rows[name]
        (low, high), (worst, best) = row["kl_ci95"], row["recovered_gap_ci95"]
        lines.append(
            f"| {name} | {row['kl_mean_nats']:.5f} ({low:.5f}–{high:.5f}) "
            f"| {row['recovered_gap']:.0%} ({worst:.0%}–{best:.0%}) "
            f"| {row['perplexity']:.3f}{_tie(document, 'nll', name)} "
            f"| {row['same_top1']:.2%}{_tie(document, 'same_top1', name)} "
            f"| {row['similarity']:.4f}{_tie(document, 'similarity', name)} |"
        )
    conditions, seconds = document["conditions"], document["seconds"]
    compress, tune = conditions["compress"], conditions["tune"]
    times = ", ".join(f"{name} {median(values):.0f} s" for name, values in seconds.items())
    lines += [
        "",
        f"{conditions['model']}, {compress['mode']} group {compress['group_size']}, rank {compress['rank']}; BF16 has "
        f"perplexity {document['rows']['BF16']['perplexity']:.3f}. Tuned on {conditions['train_tokens']} tokens of "
        f"{conditions['train']}, {tune['steps']} steps of {tune['batch_size'] * tune['gradient_accumulation_steps']} "
        f"sequences, learning rate {tune['learning_rate']:g}; tested on {conditions['test_sequences']} x "
        f"{conditions['sequence_length']} other tokens; {conditions['calibration_sequences']} calibration sequences; "
        f"{len(conditions['seeds'])} seeds, tuning took (median) {times}; {conditions['device_name']}, "
        f"{conditions['threads']} threads; encoder {conditions['encoder']}.{_about_auto_round(conditions)}"
        + (" ≈: no difference from ovexport, tuned, that a 95 % interval shows." if "differences" in document else ""),
    ]
    return "\n".join(lines)


def _tie(document: dict[str, Any], figure: str, name: str) -> str:
    """A mark where the interval of the difference from our row holds 0."""
    found = document.get("differences", {}).get(f"{figure} ovexport, tuned - {name}")
    if not found or found["ci95"] is None:
        return ""
    low, high = found["ci95"]
    return " ≈" if low <= 0 <= high else ""


def _about_auto_round(conditions: dict[str, Any]) -> str:
    """What its row was made with, or why there is none."""
    about = conditions.get("auto_round")
    if about is None:
        return ""
    if "left_out" in about:
        return f" No row of AutoRound: {about['left_out']}."
    return f" AutoRound {about['versions']['auto-round']} with {about['sequences']} of the calibration sequences."


def tuning_table(document: dict[str, Any]) -> str:
    """What benchmarks/tuning.py measured: a line per shape and side."""
    conditions = document["conditions"]
    tokens = conditions["sequences"] * conditions["sequence_length"]
    names = {"ours": "ovexport", "theirs": "documented NNCF loop"}
    lines = ["| shape | | tokens per second | peak memory, MB | loss at the last step |", "|---|---|---:|---:|---:|"]
    for shape, sides in document["figures"].items():
        for side, runs in sides.items():
            seconds = median([value for run in runs for value in run["seconds"]])
            peak = median([run["peak_memory_bytes"] for run in runs])
            loss = median([run["losses"][-1] for run in runs])
            lines.append(f"| {shape} | {names[side]} | {tokens / seconds:.0f} | {peak / 1e6:.0f} | {loss:.5f} |")
        ratios = {name: document["ratios"][f"{name} {shape}"] for name in ("tokens_per_s", "peak_memory", "final_loss")}
        shown = [_spread(one) for one in ratios.values()]
        lines.append(f"| {shape} | ours over theirs | {' | '.join(shown)} |")
    lines += [
        "",
        f"{conditions['device_name']}, {conditions['threads']} threads; random Llama shapes, bfloat16, rank "
        f"{conditions['rank']}, group {conditions['group_size']}, {conditions['sequences']} x "
        f"{conditions['sequence_length']} tokens a step in microbatches of {conditions['microbatch']}; in brackets the "
        f"95 % interval over {conditions['timed_steps']} timed steps, of memory and loss the range over processes.",
    ]
    return "\n".join(lines)


def downstream_table(document: dict[str, Any]) -> str:
    """What benchmarks/downstream.py measured: a row per way of tuning, in the published order, and the differences."""
    titles = {"answer_nll_nats": "NLL of the right answer, nats"}
    figures = {name: titles.get(name, name) for name in next(iter(document["rows"].values()))}
    lines = [
        "| |" + "".join(f" {title} |" for title in figures.values()) + " tuning, s |",
        "|---|" + "---:|" * (len(figures) + 1),
    ]
    for row, values in document["rows"].items():
        shown = [f"{values[name]['mean']:.4f} ± {values[name]['standard_error']:.4f}" for name in figures]
        lines.append(f"| {row} | {' | '.join(shown)} | {_tuning_seconds(row, document['seconds'])} |")
    lines += ["", "| difference | " + " | ".join(figures.values()) + " |", "|---|" + "---:|" * len(figures)]
    for pair, differences in document["differences"].items():
        lines.append(f"| {pair} | " + " | ".join(_difference(differences[name]) for name in figures) + " |")
    return "\n".join([*lines, "", _downstream_conditions(document)])


def _tuning_seconds(row: str, seconds: dict[str, list[float]]) -> str:
    taken = f"{median(seconds[row]):.0f}" if row in seconds else "–"
    if row.endswith("then PTQ)"):
        return f"{taken} after LoRA's"
    return f"{taken} + {median(seconds['search']):.0f} of search" if row.endswith("NLS)") else taken


def _downstream_conditions(document: dict[str, Any]) -> str:
    conditions, step = document["conditions"], document["ratios"]["step_time NLS / LoRA"]
    compress, tune, examples = conditions["compress"], conditions["tune"], conditions["examples"]
    batch = tune["batch_size"] * tune["gradient_accumulation_steps"]
    length = f"{tune['steps']} steps" if tune["steps"] else f"{tune['epochs']} epochs"
    return (
        f"{conditions['model']} on {conditions['task']}: {examples['train']} examples to tune on, "
        f"{examples['validation']} to validate, {conditions['test']} test questions, lm-evaluation-harness "
        f"{conditions['lm_eval']}, {conditions['num_fewshot']} worked examples; ± is a standard error over the "
        f"questions; {compress['mode']} group {compress['group_size']}, ranks "
        f"{' '.join(map(str, compress['rank_space']))}, LoRA's {conditions['lora_rank']}; {length} of "
        f"{batch} examples, loss on {tune['loss_on']}, learning rate {tune['learning_rate']:g} (PEFT "
        f"{conditions['peft']}: {conditions['lora_learning_rate']:g}); {len(conditions['seeds'])} seeds. The 95 % "
        "intervals in brackets are over these seeds and questions, which are taken as independent; they say little "
        "about other seeds. An interval that contains 0 is a tie. A tuning step with random ranks takes "
        f"{_spread(step, '.3f')} of the time of a step with the largest rank. Codes that differ from the tuned ones: "
        f"{document['code_mismatches']}. Questions that torch and the IR answer differently: "
        f"{document['questions_torch_answers_otherwise']}. The whole table took "
        f"{document['seconds']['all'][0] / 60:.0f} minutes; {conditions['device_name']}, "
        f"{conditions['threads']} threads."
    )


def _difference(difference: dict[str, Any]) -> str:
    low, high = difference["ci95"]
    return f"{difference['mean']:+.4f} ({low:+.4f} to {high:+.4f})" + (", a tie" if low <= 0 <= high else "")


def methods_table(document: dict[str, Any]) -> str:
    """What benchmarks/methods.py measured: a row per method, and QA-LoRA's two forms against each other."""
    lines = [
        "| | NLL of the right answer, nats | less FQ_LORA's | acc | bits per weight | time per output token, ms "
        "| over PTQ's | tuning, s | steps |",
        "|---|" + "---:|" * 8,
    ]
    latency, reference = document["latency"], "PTQ"
    for row, values in document["rows"].items():
        difference = document["differences"].get(f"{row} - FQ_LORA")
        lines.append(
            f"| {row} | {_with_interval(values['answer_nll_nats'])} "
            f"| {_difference(difference['answer_nll_nats']) if difference else '–'} | {_with_interval(values['acc'])} "
            f"| {values['bits_per_weight']:.3f} | {latency['time_per_output_token_ms'][row]['median']:.3f} "
            f"| {_over(latency['ratios'], row, reference)} "
            f"| {_median_or_dash(values['tuning_seconds'], '.0f')} | {_median_or_dash(values['steps'], '.0f')} |"
        )
    return "\n".join([*lines, "", _methods_conditions(document)])


def _with_interval(values: dict[str, Any]) -> str:
    low, high = values["ci95"]
    return f"{values['mean']:.4f} ({low:.4f}–{high:.4f})"


def _over(ratios: dict[str, Any], row: str, reference: str) -> str:
    """A row's time over the reference's; the later model of a pair stands above the line."""
    if row == reference:
        return "–"
    if (found := ratios.get(f"{row}/{reference}")) is not None:
        return _spread(found)
    found = ratios[f"{reference}/{row}"]
    low, high = found["ci95"]
    return _spread({"median": 1 / found["median"], "ci95": [1 / high, 1 / low]})


def _median_or_dash(values: list[float], form: str) -> str:
    return f"{median(values):{form}}" if values else "–"


def _methods_conditions(document: dict[str, Any]) -> str:
    conditions, forms = document["conditions"], document["forms"]
    compress, tune = conditions["compress"], conditions["tune"]
    shown = [
        f"{_spread(next(iter(found['ratios'].values())))} in {precision}"
        for precision, found in forms.items()
        if found is not None
    ]
    rates = ", ".join(f"{name} {tune['learning_rate'] * factor:g}" for name, factor in conditions["rates"].items())
    return (
        f"{conditions['model']} on {conditions['task']}: {conditions['test']} test questions, "
        f"{len(conditions['seeds'])} seeds, {conditions['seconds']:g} s of optimizer steps for each row and seed; "
        f"{compress['mode']} group {compress['group_size']}, rank {conditions['rank']}, learning rate "
        f"{tune['learning_rate']:g} ({rates}). The 95 % intervals in brackets are over these seeds and questions; of "
        "time, over the sessions of the benchmark, first seed, default inference precision. QA-LoRA's float16 zero "
        f"points take {' and '.join(shown)} of the time per output token of 4-bit ones. Codes, scales and zero points "
        f"that differ from the tuned ones: {document['code_mismatches']}. {conditions['device_name']}, "
        f"{conditions['threads']} threads; the whole table took {document['seconds'] / 60:.0f} minutes."
    )


def engines_table(document: dict[str, Any]) -> str:
    """What benchmarks/engines.py measured: a line per engine, and their ratios."""
    figures = {
        "compress_seconds": ("compressing, s", 1.0, ".2f"),
        "peak_memory_bytes": ("peak memory of compressing, MB", 1e-6, ".0f"),
        "step_seconds": ("tuning step, s", 1.0, ".3f"),
        "loss_nats": ("loss at the last step", 1.0, ".6f"),
    }
    lines = [
        "| engine |" + "".join(f" {title} |" for title, _, _ in figures.values()),
        "|---|" + "---:|" * len(figures),
    ]
    for engine, runs in document["figures"].items():
        shown = [format(median([run[name] for run in runs]) * of, form) for name, (_, of, form) in figures.items()]
        lines.append(f"| {engine} | {' | '.join(shown)} |")
    lines.append("| ovexport over nncf | " + " | ".join(_spread(document["ratios"][name]) for name in figures) + " |")
    conditions = document["conditions"]
    lines += [
        "",
        f"{conditions['device_name']}, {conditions['threads']} threads; a random 33 M Llama, float32, rank "
        f"{conditions['rank']}, group {conditions['group_size']}, {conditions['sequences']} x "
        f"{conditions['sequence_length']} tokens a step; medians, in brackets the range over pairs of processes.",
    ]
    return "\n".join(lines)


def peers_table(document: dict[str, Any]) -> str:
    """What benchmarks/peers.py measured: a line per model, for each part that was measured."""
    conditions, versions = document["conditions"], document["versions"]
    measured_on = (
        f"{conditions['device_name']}, {conditions['threads']} threads; llama-cpp-python "
        f"{versions['llama-cpp-python']} (llama.cpp {versions['llama.cpp']}), openvino {versions['openvino']}."
    )
    parts = {"quality": _peers_quality, "speed": _peers_speed}
    lines = [line for name, part in parts.items() if name in document for line in (*part(document), "")]
    return "\n".join([*lines, measured_on])


def _peers_quality(document: dict[str, Any]) -> Iterator[str]:
    rows, conditions = document["quality"]["rows"], document["quality"]["conditions"]
    compress, tune = conditions["compress"], conditions["tune"]
    ours = (
        f"ours {compress['mode']} group {compress['group_size']}, rank {compress['rank']}, {tune['steps']} steps; "
        if compress and tune
        else ""
    )
    yield (
        "| | bits per weight | file, MB | weights, MB | KL of the weights, nats (95 %) | same likeliest token "
        "| perplexity | KL as the engine runs, nats (95 %) | same likeliest token | perplexity | matrices |"
    )
    yield "|---|" + "---:|" * 9 + "---|"
    for name, row in sorted(rows.items(), key=lambda item: float(item[1]["weights"]["kl_mean_nats"])):
        sizes = (f"{row['bits_per_weight']:.2f}", f"{row['file_bytes'] / 1e6:.2f}", f"{row['weight_bytes'] / 1e6:.2f}")
        figures = [cell for of in ("weights", "engine") for cell in _divergence_cells(row[of])]
        yield f"| {' | '.join([name, *sizes, *figures, _stored(row['types'])])} |"
    yield ""
    yield (
        f"{conditions['model']}; {ours}importance matrices of {conditions['train_tokens']} tokens of "
        f"{conditions['train']}, those that ours is tuned on; tested on {conditions['test_sequences']} x "
        f"{conditions['sequence_length']} other tokens, in pieces of {conditions['piece_tokens']} as the engines run. "
        f"The two engines' float32 models differ by {conditions['float_kl_nats']:.0e} nats."
    )


def _divergence_cells(figures: dict[str, Any]) -> tuple[str, str, str]:
    kl = f"{figures['kl_mean_nats']:.5f}"
    interval = "({:.5f}–{:.5f})".format(*figures["kl_ci95"]) if figures["kl_ci95"] else ""
    return f"{kl} {interval}".strip(), f"{figures['same_top1']:.2%}", f"{figures['perplexity']:.3f}"


def _stored(types: dict[str, Any]) -> str:
    """How many matrices are stored in each type, the type with the most bytes first."""
    found = sorted(types.items(), key=lambda item: -item[1]["bytes"])
    return ", ".join(f"{name}: {one['matrices']}" for name, one in found)


def _peers_speed(document: dict[str, Any]) -> Iterator[str]:
    models, conditions = document["speed"]["models"], document["speed"]["conditions"]
    yield (
        "| | time to first token, ms | ratio ovexport / this (95 %) | time per output token, ms "
        "| ratio ovexport / this (95 %) | bits per weight | weights, MB | matrices |"
    )
    yield "|---|" + "---:|" * 6 + "---|"
    for name, model in models.items():
        cells = [name]
        for figure in ("time_to_first_token", "time_per_output_token"):
            ratio = document["ratios"].get(f"{figure} ovexport / {name}")
            cells += [f"{model[f'{figure}_ms']['median']:.2f}", _spread(ratio)]
        cells += [f"{model['bits_per_weight']:.2f}", f"{model['weight_bytes'] / 1e6:.1f}", _stored(model["types"])]
        yield f"| {' | '.join(cells)} |"
    shape, compress, runtime = conditions["shape"], conditions["compress"], conditions["runtime"]
    busy = conditions["busy_share"]
    own, theirs = runtime["ovexport"], next(one for name, one in runtime.items() if name != "ovexport")
    yield ""
    yield (
        f"Random weights, hidden size {shape['hidden_size']}, {shape['layers']} layers; ours {compress['mode']} group "
        f"{compress['group_size']}, inference in {own['INFERENCE_PRECISION_HINT']}, KV cache "
        f"{own['KV_CACHE_PRECISION']}; llama.cpp's KV cache {theirs['type_k']}; {conditions['prompt_tokens']} prompt "
        f"and {conditions['output_tokens']} output tokens, batch {conditions['batch_size']}; "
        f"{conditions['sessions']} sessions of {conditions['repetitions']} repetitions. Before a session, other "
        f"programs took {busy['median']:.0%} of the processors' time (median; at most {busy['largest']:.0%})."
    )


def kills_table(document: dict[str, Any]) -> str:
    """A row per stage."""
    lines = ["| stage | kills | resumed runs | runs that ended with the same files |", "|---|---:|---:|---:|"]
    for name, count in document["counts"].items():
        lines.append(f"| {name} | {count['kills']} | {count['trials']} | {count['same']} |")
    return "\n".join(lines)


def fuzz_table(document: dict[str, Any]) -> str:
    """Broken and hostile inputs by what was mutated, and how they ended."""
    lines = [
        "| mutations of | cases | tracebacks | hangs | crashes | exit codes: cases |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for target, outcome in document["kinds"].items():
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(outcome["exit_codes"].items()))
        figures = " | ".join(str(outcome[name]) for name in ("cases", "tracebacks", "hangs", "crashes"))
        lines.append(f"| {target} | {figures} | {codes} |")
    return "\n".join(lines)


def frontier_table(document: dict[str, Any]) -> str:
    """What benchmarks/frontier.py measured: a line per size and maker."""
    lines = [
        "| size | made by | packed matrices, MB | KL from BF16, nats (95 %) | ours over it (95 %) |",
        "|---|---|---:|---:|---:|",
    ]
    for row in document["rows"]:
        low, high = row["kl_ci95"] or (float("nan"), float("nan"))
        ours = "ours, tuned" if row["made_by"].endswith(", tuned") else "ours"
        ratio = document["ratios"].get(f"kl {ours} / {row['made_by']}, {row['size']}")
        cells = [
            row["size"],
            row["made_by"],
            f"{row['weight_bytes'] / 1e6:.3f}",
            f"{row['kl_mean_nats']:.5f} ({low:.5f}–{high:.5f})",
            _spread(ratio),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    conditions = document["conditions"]
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in conditions["tuning_seconds"].items())
    lines += [
        "",
        f"{conditions['model']}, {conditions['test_sequences']} x {conditions['sequence_length']} test tokens, "
        f"{conditions['device_name']}. Models made at git revisions {', '.join(conditions['made_at'])}"
        + (f"; tuning took {seconds}." if seconds else "."),
    ]
    return "\n".join(lines)


MEASURED: dict[str, Callable[[dict[str, Any]], str]] = {
    "reliability": reliability_table,
    "kills": kills_table,
    "fuzz": fuzz_table,
    "exactness": exactness_table,
    "convert": convert_table,
    "verify": verify_table,
    "latency": latency_table,
    "forms": forms_table,
    "divergence": divergence_table,
    "settings": settings_table,
    "quality": quality_table,
    "tuning": tuning_table,
    "downstream": downstream_table,
    "methods": methods_table,
    "engines": engines_table,
    "peers": peers_table,
    "frontier": frontier_table,
}
"""By benchmark, what shows its document."""


def _committed(name: str) -> str:
    benchmark = name.split("-", 1)[0]
    return MEASURED[benchmark](_document(RESULTS / f"{name}.json"))


def _document(path: Path) -> dict[str, Any]:
    """What a result's file holds; nothing where it is missing, which `problems` says."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


COMMITTED = sorted(path.stem for path in RESULTS.glob("*.json"))
Tables = dict[str, Callable[[], str]]
_RESULTS: Tables = {name: partial(_committed, name) for name in COMMITTED}
_DEMO: Tables = {"demo": partial(whole_way_table, DEMO)}
PLACES: dict[Path, Tables] = {README: {"models": models_table}, BENCHMARKS_README: _DEMO | _RESULTS}
"""By page, what makes each of its tables."""


def filled(page: Path, text: str) -> str:
    """The text of a page with each of its tables between its marks made again."""
    for name, table in PLACES[page].items():
        begin, end = f"<!-- table: {name} -->\n", f"<!-- end of table: {name} -->"
        head, mark, rest = text.partition(begin)
        _, closing, tail = rest.partition(end)
        if not (mark and closing):
            sys.exit(
                f"{_shown(page)}: has no place for the table {name}; add its two marks, as the other tables have them"
            )
        text = f"{head}{begin}\n{table()}\n\n{_measured_at(name)}\n\n{end}{tail}"
    return text


def _shown(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def _origins(name: str) -> list[dict[str, Any]]:
    """What the results of a table say of their origin."""
    if name == "models":
        return [_document(result / "provenance.json") for result in MODELS]
    return [_document(DEMO / "provenance.json" if name == "demo" else RESULTS / f"{name}.json")]


def _measured_at(name: str) -> str:
    origins = [document["provenance"] for document in _origins(name) if "provenance" in document]
    revisions = ", ".join(dict.fromkeys(origin["revision"] for origin in origins)) or "unknown"
    notes = dict.fromkeys(f" {origin['note']}" for origin in origins if origin.get("note"))
    return f"Measured at git revision {revisions}.{''.join(notes)}"


def problems(page: Path, text: str) -> Iterator[str]:
    """Why the tables of a page are not those of the committed scripts."""
    for name in PLACES[page]:
        for document in _origins(name):
            yield from (f"{name}: {reason}; measure it again" for reason in stale_sources(document))
    if filled(page, text) != text:
        yield f"{_shown(page)}: its tables are not the committed results; run benchmarks/tables.py"


def main() -> None:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is stale")
    options = parser.parse_args()
    texts = {page: page.read_text(encoding="utf-8") for page in PLACES}
    if options.check:
        stale = [problem for page, text in texts.items() for problem in problems(page, text)]
        sys.exit("\n".join(dict.fromkeys(stale)) or 0)
    for page, text in texts.items():
        page.write_text(filled(page, text), encoding="utf-8")


if __name__ == "__main__":
    main()
