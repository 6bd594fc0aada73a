"""The tokenizer of an IR: made from the model's own, and checked to say the same.

The OpenVINO tokenizer is a translation, and some tokenizers are translated wrongly without a word. Texts go through
both, and what openvino-genai would refuse later is found here.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import openvino as ov
import openvino_genai
from jinja2 import TemplateError
from openvino_tokenizers import convert_tokenizer
from transformers import PreTrainedTokenizerBase

from ovexport.errors import UnsupportedModelError
from ovexport.foreign import exhausted, said
from ovexport.models.loading import (
    generation_config_file,
    load_generation_config,
    load_own_tokenizer,
)
from ovexport.openvino import genai
from ovexport.openvino.names import name_nodes
from ovexport.prompt_sets import packaged_prompts
from ovexport.recipe import ModelSpec

logger = logging.getLogger(__name__)

_PLAIN = (
    "Hello, world! It isn't 5-axis_Milling (3.14), it's \"e-mail\": you@example.org; 1,000 + 50% = $1,500?",
    "Two paragraphs.\n\nThe second has a line end.\n",
    "Größe, naïve café, señor, œuvre",
)
"""Text of which every tokenizer has to say the same."""

_RARE = (
    " a leading blank,  double ones,\ta tab, and a trailing one ",
    "def square(x):\n    return x ** 2  # comment\n",
    "中文字符。日本語のテキスト、한국어 العربية עברית हिन्दी",
    "🙂👍🏽 e\u0301 ﬁ \u00a0 \u2028 \ufeff a\r\nb",
    "<s> </s> <|endoftext|> <unk> [PAD] <pad>",
)
"""Text that many models never see: a difference is said, and refused where it is in text of the run."""

_LONGEST = 4000
_SHOWN = 12
_CURE = "give the model a tokenizer that openvino_tokenizers converts, such as a byte-level BPE"
_MESSAGE = "What is the capital of France?"


def check_tokenizer(model: ModelSpec, texts: Sequence[str] = (), *, templated: bool = False) -> None:
    """Make the OpenVINO tokenizer of a model in a temporary folder and compare the two; needs no weights.

    Args:
        texts: of the run, beside a packaged set.
        templated: whether prompts are going to be wrapped in its chat template, where it has one.

    Raises:
        ArtifactError: there is no tokenizer, or a configuration can't be read.
        UnsupportedModelError: it can't be converted, encodes or decodes a text otherwise, can't be loaded by
            openvino-genai, or has a chat template that openvino-genai can't apply; or a token that ends a text has an
            id below 0.
    """
    tokenizer = load_own_tokenizer(model)
    check_ends(model, tokenizer)
    with TemporaryDirectory(prefix="ovexport-") as folder:
        write_tokenizer(tokenizer, Path(folder), model.id, texts, templated=templated)


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, name: str, texts: Sequence[str] = (), *, templated: bool = False
) -> None:
    """Write a tokenizer as transformers and as openvino-genai read it, and compare the two.

    Args:
        name: of the model, for messages.
        texts, templated: as of check_tokenizer.

    Raises:
        UnsupportedModelError: as check_tokenizer.
    """
    tokenizer.save_pretrained(folder)
    try:
        encode, decode = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # openvino_tokenizers raises anything at all on a tokenizer it does not know
        none = not tokenizer.all_special_tokens
        cure = "it has no special token, add one, such as the token that ends a text" if none else _CURE
        raise exhausted(error, name) or UnsupportedModelError(
            f"{name}: openvino_tokenizers can't convert its tokenizer ({said(error)}); {cure}"
        ) from error
    for graph, file in ((encode, "openvino_tokenizer.xml"), (decode, "openvino_detokenizer.xml")):
        ov.save_model(graph, folder / file)
        name_nodes(folder / file)
    _require_short_template(tokenizer, name)
    comparison = _Comparison(name, tokenizer, genai.load_tokenizer(folder, name))
    for text in dict.fromkeys(text[:_LONGEST] for text in (*texts, *_PLAIN, *packaged_prompts("long")[:2])):
        comparison.check(text)
    comparison.check_ids()
    comparison.check_template(required=templated)
    for text in _RARE:
        try:
            comparison.check(text)
        except UnsupportedModelError as error:
            difference = str(error).removesuffix(f"; {_CURE}")
            comparison.notes.setdefault("rare", f"{difference}; text of a run that holds such a difference is refused")
    for note in comparison.notes.values():
        logger.warning("  %s", note)


def check_ends(model: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what openvino-genai would refuse once it generates, and say where no token ends a text.

    Raises:
        ArtifactError: generation_config.json can't be read.
        UnsupportedModelError: openvino-genai reads other tokens from it, or an id below 0.
    """
    given, file = load_generation_config(model).eos_token_id, generation_config_file(model)
    ends = {end for end in (given if isinstance(given, list) else [given]) if end is not None and end != -1}
    read = genai.end_tokens(file, model.id) if file else ends
    if read != ends or any(end < 0 for end in ends):
        raise UnsupportedModelError(
            f"{model.id}: eos_token_id={given} in its generation_config.json, of which openvino-genai reads "
            f"{sorted(read)}; give ids from 0 on"
        )
    if not ends and tokenizer.eos_token_id is None:
        logger.warning(
            "  %s: neither the generation configuration nor the tokenizer has a token that ends a text; answers end at "
            "max_new_tokens only",
            model.id,
        )


def _require_short_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a chat template whose loops jinja2's sandbox does not allow: openvino-genai applies it without limits, and
    for the first time while it loads the tokenizer.

    Raises:
        UnsupportedModelError: it is one.
    """
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": _MESSAGE}], tokenize=False)
    except OverflowError as error:
        raise UnsupportedModelError(f"{name}: its chat template loops too long ({error}); mend or remove it") from error
    except Exception:  # what else a template raises is compared where it is asked for
        return


class _Comparison:
    """A tokenizer beside its translation.

    Attributes:
        notes: differences that are said and not refused, the first of each kind.
    """

    def __init__(self, name: str, own: PreTrainedTokenizerBase, converted: openvino_genai.Tokenizer) -> None:
        self._name, self._own, self._converted = name, own, converted
        self.notes: dict[str, str] = {}
        backend = json.loads(own.backend_tokenizer.to_str())["model"] if own.is_fast else {}
        self._fuses_unknown = backend.get("fuse_unk") or backend.get("type") == "Unigram"

    def check(self, text: str) -> None:
        """Encode a text both ways, with special tokens and without, and decode it both ways.

        Where the model's own tokenizer has one unknown token for unknown characters in a row, openvino_tokenizers has
        several; that is said, not refused.

        Raises:
            UnsupportedModelError: the two differ in anything else but blanks of the decoded text.
        """
        for special in (True, False):
            expected = self._own(text, add_special_tokens=special, verbose=False)["input_ids"]
            try:
                encoded = self._converted.encode(text, add_special_tokens=special).input_ids.data
            except RuntimeError as error:
                raise self._refused(f"fails on {text[:60]!r} ({genai.told(error)})") from error
            actual = [int(token) for token in encoded.reshape(-1)]
            if self._without_runs(expected) != self._without_runs(actual):
                raise self._refused(self._first_difference(expected, actual))
            if expected != actual:
                self._note("unknown", "has another number of unknown tokens for unknown characters in a row")
        if expected:
            self._check_decoded(expected)

    def check_ids(self) -> None:
        """Compare the ids of the special tokens.

        Raises:
            UnsupportedModelError: openvino-genai has another one.
        """
        for role in ("bos", "eos", "pad"):
            expected = getattr(self._own, f"{role}_token_id")
            actual = getattr(self._converted, f"get_{role}_token_id")()
            if expected is not None and actual != expected:
                raise self._refused(f"has {role}_token_id={actual} and its own {expected}")

    def check_template(self, *, required: bool) -> None:
        """Apply the chat template both ways, where there is one.

        Raises:
            UnsupportedModelError: it is required, and openvino-genai can't apply it.
        """
        if not self._converted.chat_template:
            return
        try:
            actual = genai.apply_template(self._converted, _MESSAGE, self._name)
        except UnsupportedModelError as error:
            if required:
                raise
            self.notes["template"] = str(error)
            return
        try:
            messages = [{"role": "user", "content": _MESSAGE}]
            expected = self._own.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (TemplateError, ValueError, TypeError, AttributeError):
            return  # what transformers can't apply there is nothing to compare with
        if actual != expected:
            self.notes["template"] = (
                f"{self._name}: openvino-genai applies its chat template otherwise than transformers: {actual[:160]!r} "
                f"for {expected[:160]!r}"
            )

    def _check_decoded(self, tokens: list[int]) -> None:
        expected = self._own.decode(tokens, skip_special_tokens=True)
        actual = str(self._converted.decode(np.array([tokens], dtype=np.int64))[0])
        if expected == actual:
            return
        if "".join(expected.split()) != "".join(actual.split()):
            pairs = enumerate(zip(expected, actual, strict=False))
            begin = max(0, next((index for index, (one, other) in pairs if one != other), len(actual)) - 10)
            raise self._refused(f"decodes {expected[begin : begin + 40]!r} as {actual[begin : begin + 40]!r}")
        self._note("blanks", "decodes text with other blanks than its own")

    def _without_runs(self, tokens: Sequence[int]) -> list[int]:
        """The tokens, with one unknown token for several in a row where the model's own tokenizer has one."""
        if not self._fuses_unknown:
            return list(tokens)
        unknown = self._own.unk_token_id
        return [each for index, each in enumerate(tokens) if each != unknown or not index or tokens[index - 1] != each]

    def _first_difference(self, expected: Sequence[int], actual: Sequence[int]) -> str:
        pairs = enumerate(zip(expected, actual, strict=False))
        begin = max(0, next((index for index, (one, other) in pairs if one != other), len(actual)) - 2)
        part = slice(begin, begin + _SHOWN)
        ours, theirs = (self._own.convert_ids_to_tokens(list(tokens[part])) for tokens in (actual, expected))
        return f"encodes {self._own.decode(list(expected[part]))!r} as {ours}, its own as {theirs}"

    def _note(self, subject: str, difference: str) -> None:
        self.notes.setdefault(subject, f"{self._name}: its OpenVINO tokenizer {difference}")

    def _refused(self, difference: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._name}: its OpenVINO tokenizer {difference}; {_CURE}")
