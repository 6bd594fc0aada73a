r"""INT4 by ovexport in OpenVINO against Q4_0, Q4_1 and Q4_K_M in llama.cpp: what 4 bits cost, and how fast they run.

python benchmarks/peers.py --llama FOLDER [RECIPE] [--model MODEL] [--set section.key=value]… [--product NAME=IR]…
                           [--part quality|speed] [--threads N] [--work FOLDER] [--quick] [--json] [--save]

FOLDER is an unpacked source distribution of llama-cpp-python, which brings llama.cpp; its tools are built there:

    python -m pip download --no-binary :all: --no-deps llama-cpp-python
    tar xzf llama_cpp_python-*.tar.gz
    cd llama_cpp_python-*/
    cmake -S vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF
    cmake --build build --parallel --target llama-quantize llama-imatrix llama-bench

Quality. The recipe's model, by the recipe, against the model's GGUF files, on the token ids of the recipe's test
sequences. Their importance matrix is made of all of the recipe's training text, which is what our tuning sees. Two
figures each, against the same model in full precision, computed by the same engine in float32:

    weights    nothing but the weights is approximate. Ours: the IR in float32. Theirs: the quantized file written back
               in float32 by llama-quantize.
    engine     as the engine runs by default, activations and KV cache included. Read in short pieces, so that
               the KV cache counts.

Positions are those of ovexport.evaluate: every token of a sequence but the first is predicted. That the GGUF file in
float32 is the model is checked first, against the BF16 IR.

Speed. Random weights in the shape of SmolLM2-360M. Theirs by llama-bench: the prompt, and the tokens after it, without
choosing a token. Ours by openvino-genai: the first token, and each further one, the choice included. In each session
every side is loaded anew, one after the other in changing order; ratios are ours over theirs, in the same session.

llama.cpp's threads spin while they wait for each other. Where other programs take processor time, a thread that has to
wait for its turn holds up all of them, and a token can take many times as long: measure on an idle machine. How busy it
was before each session is measured and shown.
"""

import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import command
import numpy as np
import openvino as ov
import openvino.opset13 as ops
from intervals import interval
from intervals import ratio as ratio_of_means
from llama import Generations, LlamaCpp
from numpy.typing import NDArray
from shapes import M30, M360, Shape, build_run

from ovexport import recipe as recipes
from ovexport.artifacts import IR, RunFolder
from ovexport.bench.latency import read_back
from ovexport.bench.loading import load_pipeline
from ovexport.bench.rounds import orders, prompts, ratio, run_round, samples
from ovexport.evaluate.divergence import TokenFigures, compare, perplexity
from ovexport.openvino.graph import read_graph, weights
from ovexport.openvino.runtime import ACCURATE, PIECE_TOKENS, LogitsRunner
from ovexport.pipeline import services
from ovexport.progress import silent
from ovexport.recipe import BenchSpec, CompressSpec, Recipe
from ovexport.versions import stack_versions

RECIPE = Path(__file__).parent.parent / "pipelines" / "wikilm-16m-distill.toml"
QUANTIZATIONS = ("Q4_0", "Q4_1", "Q4_K_M")
TUNED, START = "ovexport, tuned", "ovexport, not tuned"
OURS = "ovexport"
SESSIONS, REPETITIONS = 24, 3
QUICK_SESSIONS = 8
LISTENED_SECONDS = 1.0
_IDLE = [3, 4]
LARGEST_DIFFERENCE_NATS = 1e-6
"""Of the same model in float32 in the two engines."""

Figures = dict[str, TokenFigures]
"""By what is approximate: "weights", "engine"."""


def main() -> None:
    """Measure both parts, and print a table or a JSON document."""
    parser = command.parser(__doc__, "peers", "20 steps of tuning, and a 30 M model instead of the 360 M one")
    parser.add_argument("recipe", nargs="?", type=Path, default=RECIPE, metavar="RECIPE")
    parser.add_argument(
        "--llama", type=Path, metavar="FOLDER", help="an unpacked llama-cpp-python with llama.cpp built"
    )
    parser.add_argument("--model", metavar="MODEL", help="the same as --set model.id=MODEL")
    parser.add_argument("--set", action="append", dest="overrides", default=[], metavar="section.key=value")
    parser.add_argument(
        "--product",
        action="append",
        type=_product,
        default=[],
        metavar="NAME=IR",
        help="measured; nothing is tuned then",
    )
    parser.add_argument("--part", choices=("quality", "speed"), help="one part only")
    parser.add_argument("--threads", type=int, help="of both engines; by default as many as OpenVINO takes by itself")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep what is made there, and go on from it")
    options = parser.parse_args()
    if options.llama is None:
        raise SystemExit("peers.py: give --llama, a folder in which llama.cpp is built; --help has the commands")
    folder = nullcontext(options.work) if options.work else TemporaryDirectory(prefix="ovexport-")
    with folder as scratch, redirect_stdout(sys.stderr):  # NNCF prints what it does
        document = measured(options, Path(scratch))
    command.publish(document, "peers", options, recipe=None if options.part == "speed" else options.recipe)


def _product(text: str) -> tuple[str, IR]:
    name, equals, folder = text.partition("=")
    if not (name and equals and (Path(folder) / "openvino_model.xml").is_file()):
        raise ArgumentTypeError(f"{text} is not NAME=FOLDER with an openvino_model.xml in the folder")
    return name, IR(Path(folder))


def measured(options: Namespace, scratch: Path) -> dict[str, Any]:
    """The document: the parts, their ratios, conditions."""
    threads = options.threads or _threads()
    llama = LlamaCpp(options.llama, threads)
    scratch.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"ratios": {}}
    if options.part != "speed":
        own = [f"model.id={options.model}"] if options.model else []
        quick = ["tune.steps=20"] if options.quick else []
        recipe = recipes.load(options.recipe, [*options.overrides, *own, *quick])
        document["quality"], found = quality(recipe, llama, scratch, dict(options.product))
        document["ratios"] |= found
    if options.part != "quality":
        shape, sessions = (M30, QUICK_SESSIONS) if options.quick else (M360, SESSIONS)
        with TemporaryDirectory(prefix="ovexport-") as folder:
            document["speed"], found = speed(shape, sessions, llama, Path(folder), threads)
        document["ratios"] |= found
    conditions = {"device_name": ov.Core().get_property("CPU", "FULL_DEVICE_NAME"), "threads": threads}
    versions = stack_versions() | {"llama-cpp-python": llama.version, "llama.cpp": llama.commit}
    return document | {"conditions": conditions, "versions": versions}


def _threads() -> int:
    """As many threads as the CPU runtime takes by itself."""
    number = ops.parameter([1], np.float32)
    compiled = ov.Core().compile_model(ov.Model([ops.exp(number)], [number]), "CPU")
    return int(compiled.get_property("INFERENCE_NUM_THREADS"))


def quality(
    recipe: Recipe, llama: LlamaCpp, scratch: Path, products: Mapping[str, IR]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows and conditions, and the ratios of their divergences.

    Args:
        products: by name, IRs of the recipe's model; the recipe makes ours where there are none.
    """
    resume, until = (scratch / "run").is_dir(), "trace" if products else "convert"
    run = services.run(recipe, scratch / "run", resume=resume, until=until)
    ours = products or {TUNED: run.ir("int4"), START: run.ir("plain")}
    train, test = run.data.tokens("train"), run.data.tokens("test")
    whole = llama.write_float(Path(recipe.model.id), scratch / "float.gguf")
    difference = _require_same_model(run.ir("bf16"), llama, whole, test)
    importance = llama.importance(whole, train, scratch / "importance.gguf")
    figures = {name: _our_figures(run.ir("bf16"), ir, test, recipe.evaluate.batch_size) for name, ir in ours.items()}
    rows = {name: _row(figures[name]) | _our_sizes(ir) for name, ir in ours.items()}
    for name in QUANTIZATIONS:
        file = llama.quantize(whole, name, scratch / f"{name}.gguf", importance)
        figures[name] = _their_figures(llama, whole, file, test)
        rows[name] = _row(figures[name]) | _their_sizes(llama, file)
    divergences = {name: {of: _by_sequence(one) for of, one in both.items()} for name, both in figures.items()}
    ratios = {
        f"kl {of} {name} / {other}": ratio_of_means(divergences[name][of], divergences[other][of])
        for name in ours
        for other in QUANTIZATIONS
        for of in ("weights", "engine")
    }
    conditions = _quality_conditions(recipe, run, by_recipe=not products) | {"float_kl_nats": difference}
    return {"rows": rows, "conditions": conditions}, ratios


def _quality_conditions(recipe: Recipe, run: RunFolder, *, by_recipe: bool) -> dict[str, Any]:
    """What the figures depend on; how ours were made, where the recipe made them."""
    train, test = run.data.tokens("train"), run.data.tokens("test")
    return {
        "model": Path(recipe.model.id).name,
        "compress": recipe.compress.model_dump(mode="json") if by_recipe else None,
        "tune": recipe.tune.model_dump(mode="json") if by_recipe else None,
        "train": Path(str(recipe.data.train.path)).name,
        "train_tokens": int(train.size),
        "test_sequences": len(test),
        "sequence_length": int(test.shape[1]),
        "piece_tokens": PIECE_TOKENS,
    }


def _require_same_model(base: IR, llama: LlamaCpp, whole: Path, tokens: NDArray[np.int32]) -> float:
    """The mean divergence of the GGUF file in float32 from the BF16 IR, in nats.

    Raises:
        SystemExit: it is more than rounding.
    """
    theirs = llama.logits(whole, tokens.shape[1], accurate=True)
    runners = {"ours": LogitsRunner(read_graph(base), "bf16"), "theirs": theirs}
    found = float(compare(runners, "ours", tokens, 1, silent)["theirs"].joined("kl").mean())
    theirs.close()
    if not abs(found) < LARGEST_DIFFERENCE_NATS:
        raise SystemExit(f"the GGUF file in float32 is not the IR's model: their mean divergence is {found:.2g} nats")
    return found


def _our_figures(base: IR, ir: IR, tokens: NDArray[np.int32], batch_size: int) -> Figures:
    def figures(settings: Mapping[str, Any], piece: int | None) -> TokenFigures:
        candidate = LogitsRunner(read_graph(ir), "row", settings)
        runners = {"bf16": LogitsRunner(read_graph(base), "bf16"), "row": candidate}
        return compare(runners, "bf16", tokens, batch_size, silent, piece=piece)["row"]

    return {"weights": figures(ACCURATE, None), "engine": figures({}, PIECE_TOKENS)}


def _their_figures(llama: LlamaCpp, whole: Path, file: Path, tokens: NDArray[np.int32]) -> Figures:
    length = tokens.shape[1]

    def figures(model: Path, accurate: bool, piece: int | None) -> TokenFigures:
        runners = {
            "float": llama.logits(whole, length, accurate=True),
            "row": llama.logits(model, length, accurate=accurate),
        }
        found = compare(runners, "float", tokens, 1, silent, piece=piece)["row"]
        for runner in runners.values():
            runner.close()
        return found

    values = llama.quantize(file, "F32", file.with_suffix(".values.gguf"))
    return {"weights": figures(values, True, None), "engine": figures(file, False, PIECE_TOKENS)}


def _by_sequence(figures: TokenFigures) -> NDArray[np.float64]:
    """Divergences, (1, sequences): one seed."""
    return figures.joined("kl").mean(1)[None]


def _row(figures: Figures) -> dict[str, Any]:
    return {
        of: {
            "kl_mean_nats": float(one.joined("kl").mean()),
            "kl_ci95": interval(_by_sequence(one)),
            "same_top1": float(one.joined("same_top1").mean()),
            "perplexity": perplexity(one),
        }
        for of, one in figures.items()
    }


def _our_sizes(ir: IR) -> dict[str, Any]:
    """Bytes of graph and .bin, of the matrices, and how the matrices are stored."""
    found = weights(read_graph(ir))
    size, elements = sum(weight.byte_size for weight in found), sum(weight.elements for weight in found)
    types: dict[str, dict[str, int]] = {}
    for weight in found:
        of = types.setdefault(weight.element_type, {"matrices": 0, "bytes": 0})
        of["matrices"] += 1
        of["bytes"] += weight.byte_size
    return _sizes(ir.xml.stat().st_size + ir.bin.stat().st_size, size, elements, types)


def _their_sizes(llama: LlamaCpp, file: Path) -> dict[str, Any]:
    """Bytes of the file, with its vocabulary of stand-ins, and of the matrices, and how the matrices are stored."""
    found = llama.matrices(file)
    return _sizes(file.stat().st_size, found["bytes"], found["weights"], found["types"])


def _sizes(file_bytes: int, weight_bytes: int, elements: int, types: Mapping[str, Any]) -> dict[str, Any]:
    bits = 8 * weight_bytes / elements
    return {"file_bytes": file_bytes, "weight_bytes": weight_bytes, "bits_per_weight": bits, "types": types}


def speed(
    shape: Shape, sessions: int, llama: LlamaCpp, scratch: Path, threads: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Latencies and conditions, and their ratios."""
    spec, compress = BenchSpec(threads=threads), CompressSpec(rounding="nearest")
    point = spec.points[0]
    ir = build_run(scratch, shape, compress).ir("int4")
    whole = llama.write_float(scratch / "model", scratch / "float.gguf")
    files = {name: llama.quantize(whole, name, scratch / f"{name}.gguf") for name in QUANTIZATIONS}
    whole.unlink()
    timed, busy = _sessions(ir, files, spec, sessions, llama)
    sizes = {OURS: _our_sizes(ir)} | {name: _their_sizes(llama, file) for name, file in files.items()}
    conditions = {
        "shape": {name: getattr(shape, name) for name in Shape.__slots__},
        "compress": {"mode": compress.mode, "group_size": compress.group_size},
        **point._asdict(),
        "sessions": sessions,
        "repetitions": REPETITIONS,
        "busy_share": {"median": float(np.median(busy)), "largest": max(busy)},
        "runtime": {OURS: read_back(ir, spec)} | {name: timed[name][0].settings for name in QUANTIZATIONS},
    }
    models = {name: _latencies(timed[name]) | sizes[name] for name in timed}
    return {"models": models, "conditions": conditions}, _speed_ratios(timed, spec.seed)


def _sessions(
    ir: IR, files: Mapping[str, Path], spec: BenchSpec, count: int, llama: LlamaCpp
) -> tuple[dict[str, list[Generations]], list[float]]:
    """What each side took in each session, and how busy the processors were before it."""
    point = spec.points[0]
    prompt = np.random.default_rng(0).integers(3, 1000, point.prompt_tokens).tolist()
    timed: dict[str, list[Generations]] = {name: [] for name in (OURS, *files)}
    order, busy = orders(timed, spec.seed), []
    for session in range(1, count + 1):
        busy.append(_busy_share())
        for name in next(order):
            if name == OURS:
                timed[name].append(_our_generations(ir, spec, prompt))
            else:
                timed[name].append(llama.bench(files[name], point.prompt_tokens, point.output_tokens, REPETITIONS))
        shown = f"session {session}/{count}, processors {busy[-1]:.0%} busy before it"
        print(f"\r{shown}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return timed, busy


def _busy_share() -> float:
    """What share of all processors' time other programs take, over LISTENED_SECONDS in which this one sleeps."""
    before = _processor_ticks()
    time.sleep(LISTENED_SECONDS)
    spent = _processor_ticks() - before
    return float(1 - spent[_IDLE].sum() / max(1, spent.sum()))


def _processor_ticks() -> NDArray[np.int64]:
    """Of all processors since the machine started: user, nice, system, idle, waiting for disks, and others."""
    first, *_ = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
    return np.array(first.split()[1:9], np.int64)


def _our_generations(ir: IR, spec: BenchSpec, prompt: list[int]) -> Generations:
    """A session of ours; as llama-bench, it runs once before it counts."""
    point = spec.points[0]
    pipelines, tokens = {OURS: load_pipeline(ir, spec, point.attention_backend)}, prompts(prompt, point)
    _, *rounds = (run_round(pipelines, (OURS,), tokens, point)[OURS] for _ in range(REPETITIONS + 1))
    return Generations(
        prompt_ms=[one.first_token_ms for one in rounds], token_ms=[one.output_token_ms for one in rounds], settings={}
    )


def _latencies(timed: list[Generations]) -> dict[str, Any]:
    return {
        "time_to_first_token_ms": samples([one.prompt_ms for one in timed]).model_dump(mode="json"),
        "time_per_output_token_ms": samples([one.token_ms for one in timed]).model_dump(mode="json"),
    }


def _speed_ratios(timed: Mapping[str, list[Generations]], seed: int) -> dict[str, Any]:
    figures = {"time_to_first_token": "prompt_ms", "time_per_output_token": "token_ms"}
    found = {}
    for name in QUANTIZATIONS:
        for figure, field in figures.items():
            ours, theirs = ([getattr(one, field) for one in timed[side]] for side in (OURS, name))
            found[f"{figure} {OURS} / {name}"] = ratio(ours, theirs, seed).model_dump(mode="json")
    return found


if __name__ == "__main__":
    main()
