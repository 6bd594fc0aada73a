"""llama.cpp, built in an unpacked source distribution of llama-cpp-python: its tools, and its logits.

A GGUF file of the benchmark holds the model's weights and a vocabulary of one character for each token: token ids go in
and out, and a text of these characters is read by llama.cpp's tools as exactly the ids that were meant.
"""

import ctypes
import importlib
import json
import os
import re
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

TOOLS = ("llama-quantize", "llama-imatrix", "llama-bench")
_FIRST_CHARACTER = 0xF0000
"""Of a plane that Unicode leaves to private use; the next 65,534 are too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generations:
    """What llama-bench measured in one process, by repetition.

    Attributes:
        prompt_ms: reading the prompt.
        token_ms: a token after that prompt; llama-bench takes any token, not the likeliest.
        settings: of the engine, as llama-bench reports them.
    """

    prompt_ms: list[float]
    token_ms: list[float]
    settings: dict[str, Any]


class LlamaCpp:
    """The tools of a folder.

    Raises:
        SystemExit: something is not there.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder, self._threads = folder.resolve(), threads
        for name in ("PKG-INFO", "llama_cpp/llama_cpp.py", "vendor/llama.cpp/gguf-py", *map(self._binary, TOOLS)):
            if not (self._folder / name).exists():
                raise SystemExit(f"--llama {folder}: has no {name}; build llama.cpp there as --help says")

    @staticmethod
    def _binary(tool: str) -> str:
        return f"build/bin/{tool}"

    @property
    def version(self) -> str:
        """Of llama-cpp-python."""
        lines = (self._folder / "PKG-INFO").read_text(encoding="utf-8").splitlines()
        return next(line.removeprefix("Version: ") for line in lines if line.startswith("Version: "))

    @property
    def commit(self) -> str:
        """Of llama.cpp, as its build knows it."""
        found = re.search(r"commit (\w+)", self._run("llama-imatrix", "--version"))
        return found.group(1) if found else "unknown"

    @property
    def gguf(self) -> Any:
        """The package that reads and writes GGUF files."""
        path = str(self._folder / "vendor" / "llama.cpp" / "gguf-py")
        if path not in sys.path:
            sys.path.insert(0, path)
        return importlib.import_module("gguf")

    def write_float(self, model: Path, out: Path) -> Path:
        """The GGUF file of a Llama's folder, its weights in float32.

        Raises:
            SystemExit: it is no Llama, or one with scaled positions.
        """
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        config = network.config.to_dict()
        rope = config.get("rope_parameters") or config
        if config["model_type"] != "llama" or rope.get("rope_type", "default") != "default":
            raise SystemExit(f"{model}: peers.py writes GGUF files of Llamas without scaled positions only")
        writer = self.gguf.GGUFWriter(out, "llama")
        _add_sizes(writer, config, rope["rope_theta"])
        _add_vocabulary(writer, config["vocab_size"], self.gguf.TokenType.NORMAL)
        names = self.gguf.get_tensor_name_map(self.gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
        for name, tensor in network.state_dict().items():
            if name == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), interleaved(name, tensor, config))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return out

    def importance(self, model: Path, tokens: NDArray[np.int32], out: Path) -> Path:
        """The importance matrix of a GGUF file over sequences of tokens, (sequences, length)."""
        text = out.with_name(f"{out.name}.txt")
        text.write_text("".join(chr(_FIRST_CHARACTER + token) for token in tokens.reshape(-1)), encoding="utf-8")
        length = str(tokens.shape[1])
        said = self._run(
            "llama-imatrix", "-m", model, "-f", text, "-o", out, "-c", length, "-t", self._threads, "--no-ppl"
        )
        counted = f"computing over {len(tokens)} chunks, n_ctx={length}"
        if counted not in said:
            raise SystemExit(f"llama-imatrix did not read {len(tokens)} sequences of {length} tokens: {said[-2000:]}")
        return out

    def quantize(self, model: Path, quantization: str, out: Path, importance: Path | None = None) -> Path:
        """A GGUF file with other types of weights; "F32" gives the values that a quantized one stands for."""
        weighted = ("--imatrix", importance) if importance else ()
        self._run("llama-quantize", "--allow-requantize", *weighted, model, out, quantization, self._threads)
        return out

    def matrices(self, model: Path) -> dict[str, Any]:
        """How a GGUF file stores its matrices: bytes and number by type, bytes and weights in all."""
        tensors = [tensor for tensor in self.gguf.GGUFReader(model).tensors if len(tensor.shape) > 1]
        counts = Counter(tensor.tensor_type.name for tensor in tensors)
        sizes: Counter[str] = Counter()
        for tensor in tensors:
            sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
        return {
            "types": {name: {"matrices": counts[name], "bytes": sizes[name]} for name in counts},
            "bytes": sizes.total(),
            "weights": sum(int(tensor.n_elements) for tensor in tensors),
        }

    def logits(self, model: Path, length: int, *, accurate: bool) -> "Logits":
        """What gives a GGUF file's logits of sequences of at most `length` tokens."""
        return Logits(self._bindings(), model, length, self._threads, accurate=accurate)

    def bench(self, model: Path, prompt: int, output: int, repetitions: int) -> Generations:
        """Time llama-bench's own tests: the prompt, and the tokens that follow it."""
        tests = (("-p", prompt, "-n", 0), ("-p", 0, "-n", output, "-d", prompt))
        common = ("-m", model, "-t", self._threads, "-r", repetitions, "-o", "json")
        reading, writing = (json.loads(self._run("llama-bench", *common, *test, errors=False))[0] for test in tests)
        shown = ("build_commit", "backends", "n_threads", "type_k", "type_v", "n_batch", "n_ubatch", "flash_attn")
        return Generations(
            prompt_ms=[sample / 1e6 for sample in reading["samples_ns"]],
            token_ms=[sample / 1e6 / output for sample in writing["samples_ns"]],
            settings={name: writing[name] for name in shown},
        )

    def _run(self, tool: str, *arguments: object, errors: bool = True) -> str:
        """What a tool printed; its standard error too, if `errors`."""
        command = [str(self._folder / self._binary(tool)), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise SystemExit(f"{tool} failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
        return done.stdout + done.stderr if errors else done.stdout

    def _bindings(self) -> Any:
        """The thin bindings to libllama. The package around them needs others, so its own code is left out."""
        if "llama_cpp" not in sys.modules:
            package = types.ModuleType("llama_cpp")
            package.__path__ = [str(self._folder / "llama_cpp")]
            sys.modules["llama_cpp"] = package
            os.environ["LLAMA_CPP_LIB_PATH"] = str(self._folder / "build" / "bin")
        return importlib.import_module("llama_cpp.llama_cpp")


class Logits:
    """A loaded GGUF file that gives the logits of whole sequences, as ovexport's LogitsRunner does.

    Args:
        bindings: to libllama.
        accurate: keys and values in float32 and plain attention; else llama.cpp's defaults.

    Attributes:
        vocabulary: how many logits a token has.
    """

    def __init__(self, bindings: Any, model: Path, length: int, threads: int, *, accurate: bool) -> None:
        self._llama = bindings
        self._silent = bindings.llama_log_callback(lambda level, text, data: None)
        bindings.llama_log_set(self._silent, ctypes.c_void_p(0))
        bindings.llama_backend_init()
        self._model = bindings.llama_model_load_from_file(str(model).encode(), bindings.llama_model_default_params())
        settings = bindings.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = length
        settings.n_threads = settings.n_threads_batch = threads
        if accurate:
            settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
            settings.flash_attn_type = bindings.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = bindings.llama_init_from_model(self._model, settings) if self._model else None
        if not self._context:
            raise SystemExit(f"{model}: llama.cpp can't load it")
        self._batch = bindings.llama_batch_init(length, 0, 1)
        self.vocabulary = int(bindings.llama_vocab_n_tokens(bindings.llama_model_get_vocab(self._model)))

    def pieces(self, tokens: NDArray[np.int64], longest: int) -> Iterator[NDArray[np.float32]]:
        """Logits (1, at most `longest`, vocabulary) of one piece of the tokens (1, length) after the other, each of
        which overwrites those before it.

        Raises:
            ValueError: there is more than one sequence.
        """
        if len(tokens) != 1:
            raise ValueError(f"llama.cpp is given one sequence at a time, not {len(tokens)}")
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        for begin in range(0, tokens.shape[1], longest):
            yield self._decoded(tokens[0, begin : begin + longest], begin)

    def _decoded(self, tokens: NDArray[np.int64], begin: int) -> NDArray[np.float32]:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens.tolist()):
            batch.token[index] = token
            batch.pos[index] = begin + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = 1
        if code := self._llama.llama_decode(self._context, batch):
            raise SystemExit(f"llama.cpp can't read the tokens (llama_decode: {code})")
        logits = self._llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (1, len(tokens), self.vocabulary))

    def close(self) -> None:
        """Free the model's memory."""
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)


def _add_sizes(writer: Any, config: dict[str, Any], rope_theta: float) -> None:
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope_theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_vocabulary(writer: Any, size: int, normal: int) -> None:
    """A SentencePiece vocabulary of single characters; no two of them together are a token, so none are ever merged."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list([chr(_FIRST_CHARACTER + token) for token in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([normal] * size)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def interleaved(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> NDArray[np.float32]:
    """A weight in llama.cpp's order: it rotates neighbouring rows of a head of queries or keys, where transformers
    rotates a row of the first half with one of the second."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    part = name.removesuffix(".weight").rpartition(".")[2]
    if part in heads:
        rows, columns = tensor.shape
        tensor = tensor.reshape(heads[part], 2, rows // heads[part] // 2, columns).transpose(1, 2).reshape(rows, -1)
    return np.ascontiguousarray(tensor.numpy())
