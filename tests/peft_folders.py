"""LoRA adapters as PEFT saves them, of tiny models."""

import json
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

TOKENS = torch.tensor([[5, 17, 300, 42, 7, 99, 1200, 8]])
PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
GPT2 = GPT2Config(
    vocab_size=2048,
    n_embd=64,
    n_layer=2,
    n_head=4,
    n_positions=128,
    initializer_range=0.1,
    bos_token_id=0,
    eos_token_id=1,
)


def base_of(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save_adapter(model: Path, folder: Path, **config: object) -> Path:
    """A LoRA of PEFT's that was tuned, as far as its weights tell."""
    torch.manual_seed(1)
    adapted = get_peft_model(base_of(model), LoraConfig(**config))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float().numpy()


def edit(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
