"""The walk through a decoder's blocks: each reads what the ones before it give, and their layers are found in order."""

import pytest
import torch
import transformers
from conftest import COMMON
from torch import nn
from transformers import PreTrainedModel

from ovexport.errors import UnsupportedModelError
from ovexport.models.architecture import Architecture
from ovexport.models.blocks import Block
from ovexport.models.head import hidden_states

GPT2 = {"vocab_size": 2048, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
CONFIGURATIONS = {"llama": transformers.LlamaConfig(**COMMON), "gpt2": transformers.GPT2Config(**GPT2)}


def small_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGURATIONS[family]).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    """34 sequences: the largest batch of at most 16 that leaves no rest has 2 of them."""
    return torch.randint(0, 2048, (34, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_the_blocks_one_after_the_other_are_the_model(family: str, tokens: torch.Tensor) -> None:
    network = small_model(family)
    blocks = list(Architecture(network).walk_blocks(tokens))
    assert [block.name for block in blocks] == list(Architecture(network).blocks())
    with torch.no_grad():
        last = torch.cat([blocks[-1].run(states) for states in blocks[-1].inputs])
        norm = network.base_model.norm if family == "llama" else network.base_model.ln_f
        torch.testing.assert_close(norm(last), hidden_states(network, tokens), rtol=1e-4, atol=1e-5)


def test_batches_are_of_equal_size(tokens: torch.Tensor) -> None:
    block = next(Architecture(small_model("llama")).walk_blocks(tokens))
    assert {len(states) for states in block.inputs} == {2}
    assert len(block.inputs) == 17


def test_later_blocks_read_what_a_changed_block_gives(tokens: torch.Tensor) -> None:
    def second_inputs(change: bool) -> list[torch.Tensor]:
        walk = Architecture(small_model("llama")).walk_blocks(tokens)
        first = next(walk)
        if change:
            first.module.mlp.down_proj.weight.data.zero_()  # type: ignore[union-attr, operator]
        expected = [first.run(states).detach() for states in first.inputs]
        states = list(next(walk).inputs)
        assert all(torch.equal(ours, other) for ours, other in zip(expected, states, strict=True))
        return states

    assert not torch.equal(second_inputs(change=False)[0], second_inputs(change=True)[0])


def linear_weights(block: Block) -> list[str]:
    return [f"{block.name}.{name}.weight" for name, part in block.module.named_modules() if isinstance(part, nn.Linear)]


def test_layers_that_read_the_same_tensor_stand_together_in_the_order_they_run(tokens: torch.Tensor) -> None:
    block = next(Architecture(small_model("llama")).walk_blocks(tokens))
    groups = block.layers_by_input(reversed(linear_weights(block)))
    short = [{name.split(".")[-2] for name in group} for group in groups]
    assert short == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]


def test_a_layers_inputs_are_what_it_reads(tokens: torch.Tensor) -> None:
    network = small_model("llama")
    seen: list[torch.Tensor] = []
    block = next(Architecture(network).walk_blocks(tokens))
    read = list(block.inputs_of(f"{block.name}.mlp.down_proj.weight"))
    handle = block.module.mlp.down_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))  # type: ignore[union-attr, operator]
    block.run(block.inputs[3])
    handle.remove()
    assert len(read) == len(block.inputs)
    assert torch.equal(read[3], seen[0])


def test_no_hook_stays_behind(tokens: torch.Tensor) -> None:
    network = small_model("llama")
    for block in Architecture(network).walk_blocks(tokens):
        block.layers_by_input(linear_weights(block))
        list(block.inputs_of(linear_weights(block)[0]))
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_running_a_block_records_gradients(tokens: torch.Tensor) -> None:
    block = next(Architecture(small_model("llama")).walk_blocks(tokens))
    block.run(block.inputs[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in block.module.parameters())


def test_a_block_holds_its_own_parameters_alone(tokens: torch.Tensor) -> None:
    block = next(Architecture(small_model("llama")).walk_blocks(tokens))
    assert block.holds("model.layers.0.mlp.up_proj.weight")
    assert not block.holds("model.layers.01.mlp.up_proj.weight")


def test_a_model_without_a_list_of_blocks_is_refused(tokens: torch.Tensor) -> None:
    network = small_model("llama")
    network.model.layers = nn.Sequential(*network.model.layers)
    with pytest.raises(UnsupportedModelError, match="llama: has no list of decoder blocks"):
        next(Architecture(network).walk_blocks(tokens))
