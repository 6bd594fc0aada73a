"""Train storyteller-4m, the model that ships with ovexport, from a file of short stories.

    python models/train_storyteller.py stories.json models/storyteller-4m

The stories are a JSON list of strings (TinyStories, CDLA-Sharing-1.0, in our case). The last `HELD_OUT` of them are
never trained on: they choose the best step and give the perplexity of the card. Half of the passes over a story show
it as a chat, its first sentence said by the user, so that the chat template means something to the model.

Afterwards `--sample-text FILE` lets the model write the text that the demo tunes, validates and tests on: text of our
own, drawn from the distribution that the model really produces (the idea of LLM-QAT, arXiv:2305.17888).
"""

import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HELD_OUT = 100
SEQUENCE_LENGTH = 256
VOCABULARY = 2048
BEGIN, END, USER, ASSISTANT = "<s>", "</s>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(stories: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` pieces, trained on the stories."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(stories, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model() -> LlamaForCausalLM:
    """The untrained model; every in-features is a multiple of 64."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        attention_dropout=0.1,
    )
    return LlamaForCausalLM(config)


def as_chat(story: str) -> str:
    """The story with its first sentence said by the user and the rest by the assistant."""
    first, rest = [*re.split(r"(?<=[.!?])\s+", story, maxsplit=1), ""][:2]
    return f"{USER}{first}{ASSISTANT}{rest}"


def training_batches(
    stories: list[str], tokenizer: PreTrainedTokenizerFast, batch_size: int, chance: random.Random
) -> Iterator[torch.Tensor]:
    """Endless batches (batch_size, SEQUENCE_LENGTH) of packed stories, shuffled anew each pass."""
    stream: list[int] = []
    while True:
        for story in chance.sample(stories, len(stories)):
            text = as_chat(story) if chance.random() < 0.5 else story
            stream += tokenizer.encode(f"{BEGIN}{text}{END}")
            if len(stream) >= batch_size * SEQUENCE_LENGTH:
                size = batch_size * SEQUENCE_LENGTH
                yield torch.tensor(stream[:size]).view(batch_size, SEQUENCE_LENGTH)
                stream = stream[size:]


def held_out_loss(model: LlamaForCausalLM, stories: list[str], tokenizer: PreTrainedTokenizerFast) -> float:
    """Mean negative log-likelihood per token of the held-out stories, in nats."""
    ids = [token for story in stories for token in tokenizer.encode(f"{BEGIN}{story}{END}")]
    rows = torch.tensor(ids[: len(ids) // SEQUENCE_LENGTH * SEQUENCE_LENGTH]).view(-1, SEQUENCE_LENGTH)
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() for part in rows.split(16) if len(part) == 16]
    model.train()
    return sum(losses) / len(losses)


def train(stories: list[str], out: Path, *, steps: int, batch_size: int, learning_rate: float, seed: int) -> None:
    """Train, keep the step with the least held-out loss, save model and tokenizer in bfloat16 safetensors."""
    torch.manual_seed(seed)
    training, held_out = stories[:-HELD_OUT], stories[-HELD_OUT:]
    tokenizer = build_tokenizer(training)
    tokenizer.save_pretrained(out)
    model = build_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(training)} stories", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2),
    )
    batches = training_batches(training, tokenizer, batch_size, random.Random(seed))
    best, started = math.inf, time.monotonic()
    for step in range(1, steps + 1):
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            validation = held_out_loss(model, held_out, tokenizer)
            elapsed = time.monotonic() - started
            print(f"step {step} loss {loss.item():.3f} held-out {validation:.4f} {elapsed:.0f} s", flush=True)
            if validation < best:
                best = validation
                LlamaForCausalLM.from_pretrained(
                    None, config=model.config, state_dict=model.state_dict(), dtype=torch.bfloat16
                ).save_pretrained(out)
    print(f"held-out perplexity {math.exp(best):.3f} per token", flush=True)


def sample_text(folder: Path, file: Path, *, documents: int, seed: int) -> None:
    """Let the model write `documents` stories at temperature 0.8 and top-p 0.95, one JSON line each."""
    torch.manual_seed(seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts: list[str] = []
    while len(texts) < documents:
        start = torch.full((64, 1), tokenizer.bos_token_id)
        ids = model.generate(start, do_sample=True, temperature=0.8, top_p=0.95, top_k=0, max_new_tokens=384)
        finished = [row for row in ids.tolist() if tokenizer.eos_token_id in row]
        stories = (tokenizer.decode(row, skip_special_tokens=True).strip() for row in finished)
        texts += [story for story in stories if len(story) > 200]
        print(f"{len(texts)} stories", flush=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts[:documents])
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stories", type=Path, help="JSON list of stories; with --sample-text it is not read")
    parser.add_argument("out", type=Path, help="folder of the model")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample-text", type=Path, help="do not train: write a text sample of the model to this file")
    parser.add_argument("--documents", type=int, default=550)
    options = parser.parse_args()
    if options.sample_text:
        sample_text(options.out, options.sample_text, documents=options.documents, seed=options.seed)
        return
    train(
        json.loads(options.stories.read_text(encoding="utf-8")),
        options.out,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
