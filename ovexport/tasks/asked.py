"""The model that lm-evaluation-harness asks: tokens and likelihoods, the same for torch and for an IR.

A question's choices share its tokens, so these go through the model once: `begin` reads them, `extend` goes on with
every choice from there.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol, TextIO

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ovexport.errors import DataError
from ovexport.progress import Listener, Progress, silent

Logits = NDArray[np.float32]
_LONGEST = 2048
_MAX_NEW_TOKENS = 256


class CausalLM(Protocol):
    """What a model has to do: logits of tokens, and of more tokens behind them."""

    def begin(self, tokens: NDArray[np.int64]) -> Logits:
        """Logits, (1, length, vocabulary) float32, of tokens, (1, length), with nothing before them."""

    def extend(self, tokens: NDArray[np.int64]) -> Logits:
        """Logits, (rows, length, vocabulary), of rows of tokens that each go on from what was read so far; of several
        rows none can be extended further."""


class AskedModel(TemplateLM):  # type: ignore[misc]
    """A causal LM as lm-evaluation-harness sees it.

    Args:
        model: None where only tokens are needed.
        name: for progress.
        longest: tokens that the model can read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: CausalLM | None = None,
        *,
        name: str = "",
        longest: int | None = None,
        listener: Listener = silent,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._model = model
        self._name = name
        self._longest = longest or _LONGEST
        self._listener = listener
        self._stderr: TextIO | None = None

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id or 0)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands where there is no question."""
        beginning = self.tokenizer.bos_token_id
        return self.eot_token_id if beginning is None else int(beginning)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, as the tokenizer begins one; one that holds the beginning already gets no second one."""
        beginning = self.tokenizer.decode([self.prefix_token_id])
        if add_special_tokens is None and beginning and string.startswith(beginning):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, verbose=False, **options))

    def encode(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of the question and of the answer, split where lm-evaluation-harness splits them."""
        if question:
            first, second = self._encode_pair(question, answer)
            return list(first), list(second)
        tokens = self.tok_encode(answer, add_special_tokens=False)
        return ([self.prefix_token_id], tokens) if tokens[0] != self.prefix_token_id else (tokens[:1], tokens[1:])

    @contextlib.contextmanager
    def reporting_to(self, stream: TextIO) -> Iterator[None]:
        """Within, progress goes to this stream, whatever has become of sys.stderr."""
        self._stderr = stream
        try:
            yield
        finally:
            self._stderr = None

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Per request the sum of the answer's log-probabilities, in nats, and whether each token is the likeliest."""
        results: list[tuple[float, bool]] = []
        for question, alike in groupby(requests, key=lambda request: self._cut(request[1], request[2])):
            results += self._likelihoods(question, [answer for _, _, answer in alike])
            self._report(len(results), len(requests))
        return results

    def _cut(self, question: list[int], answer: list[int]) -> tuple[int, ...]:
        """The end of the question that fits before the answer, whose last token is not read.

        Raises:
            DataError: none fits, or the answer has no tokens.
        """
        if not 0 < len(answer) <= self._longest:
            raise DataError(
                f"an answer has {len(answer)} tokens, and the model reads {self._longest}: the task can't be asked"
            )
        return tuple(question[max(0, len(question) + len(answer) - 1 - self._longest) :])

    def _likelihoods(self, question: tuple[int, ...], answers: list[list[int]]) -> list[tuple[float, bool]]:
        assert self._model is not None
        longest = max(map(len, answers)) - 1
        rows = np.zeros((len(answers), max(1, longest)), dtype=np.int64)
        for row, answer in zip(rows, answers, strict=True):
            row[: len(answer) - 1] = answer[:-1]
        first = self._model.begin(np.array([question], dtype=np.int64))[:, -1:]
        rest = self._model.extend(rows) if longest else first[:, :0].repeat(len(answers), 0)
        results = []
        for row, answer in zip(rest, answers, strict=True):
            logits = np.concatenate([first[0], row[: len(answer) - 1]]).astype(np.float64)
            shifted = logits - logits.max(-1, keepdims=True)
            chosen = shifted[np.arange(len(answer)), answer]
            total = float((chosen - np.log(np.exp(shifted).sum(-1))).sum())
            results.append((total, bool((shifted.argmax(-1) == answer).all())))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """No task that is known here asks for it."""
        raise TypeError("a text's likelihood is measured by ovexport.evaluate, not as a task")

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each up to the first of its stops; none takes more than half of what the model reads, where
        lm-evaluation-harness's own models refuse."""
        answers = []
        for index, request in enumerate(requests):
            question, options = request.args
            stops = [stop for stop in options.get("until", []) if stop]
            answers.append(self._answer(question, stops, int(options.get("max_gen_toks", _MAX_NEW_TOKENS))))
            self._report(index + 1, len(requests))
        return answers

    def _answer(self, question: str, stops: Sequence[str], most: int) -> str:
        assert self._model is not None
        most = min(most, self._longest // 2)
        room = self._longest - most
        tokens = np.array([self.tok_encode(question)[-room:]], dtype=np.int64)
        token = int(self._model.begin(tokens)[0, -1].argmax())
        answer: list[int] = []
        text = ""
        while token != self.tokenizer.eos_token_id and len(answer) < most:
            answer.append(token)
            text = self.tokenizer.decode(answer, skip_special_tokens=True)
            if any(stop in text for stop in stops):
                break
            token = int(self._model.extend(np.array([[token]], dtype=np.int64))[0, -1].argmax())
        ends = [text.index(stop) for stop in stops if stop in text]
        return text[: min(ends, default=len(text))]

    def _report(self, done: int, total: int) -> None:
        with contextlib.redirect_stderr(self._stderr or sys.stderr):
            self._listener(Progress(task=f"task of {self._name}", done=done, total=total))
