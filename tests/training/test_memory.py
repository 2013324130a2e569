"""What ``--memory`` says against tensors of the same shapes on the ``meta`` device, which know their sizes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from meta_device import SHAPES, Allocations, adapted, two_layers
from runs import ITERATE
from torch import Tensor

from selfevo.generate.decoder import row_cache
from selfevo.lora import lora_parameters
from selfevo.training import DPOObjective, PairIds, estimate_memory
from selfevo.training.memory import GIB


def kernel_of_gpus(queries: Tensor, keys: Tensor, values: Tensor, *, attn_mask: Tensor | None, **how: bool) -> Tensor:
    """PyTorch's memory-efficient attention; on the meta device it would take the plain formula, with all scores."""
    shared = queries.shape[1] // keys.shape[1]
    keys, values = (side.repeat_interleave(shared, dim=1) if shared > 1 else side for side in (keys, values))
    bias = None if attn_mask is None else torch.zeros_like(attn_mask, dtype=queries.dtype)
    bias = None if bias is None else bias.expand(*queries.shape[:2], -1, -1)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(queries, keys, values, bias, True, 0.0, how["is_causal"])[0]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("shape", ["Llama-3-8B", "Qwen2-7B"])
def test_activations_are_those_of_a_row_of_the_published_width(
    shape: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel_of_gpus)
    config = two_layers(shape)
    model = adapted(config)
    model.checkpoint_activations = checkpointed
    # enough tokens in replies for the head's budget of bytes
    pairs = [PairIds(list(range(n, 1000 + n)), list(range(500)), list(range(9, 400))) for n in range(2)]
    objective = DPOObjective(pairs, torch.zeros(2, 2), ["a", "a"])
    tokens = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, given: tokens.append(given[0].numel()))
    with Allocations() as found:
        for tensor in model.state_dict().values():
            found.see(tensor, count=False)
        for parameter in lora_parameters(model):
            parameter.grad = torch.zeros_like(parameter)
            found.see(parameter.grad)
        before = found.live
        objective.loss(model, range(2))[0].backward()
    said = estimate_memory(config, iterations=1, row_tokens=tokens[0], checkpointed=checkpointed).activations
    assert said == pytest.approx(found.peak - before, rel=0.1), tokens[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_adapters_and_cache_are_counted_to_the_byte(shape: str) -> None:
    config = two_layers(shape)
    model = adapted(config)
    said = estimate_memory(config, iterations=1, slots=24, context=1000)
    optimiser = torch.optim.AdamW(lora_parameters(model))
    for parameter in lora_parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    states = [value for state in optimiser.state.values() for value in state.values() if value.dim()]
    grads = [parameter.grad for parameter in lora_parameters(model) if parameter.grad is not None]
    adapters = [tensor for name, tensor in model.state_dict().items() if name.split(".")[-1][:4] in ("lora", "froz")]
    weights = [tensor for name, tensor in model.state_dict().items() if name.split(".")[-1] in ("weight", "bias")]
    assert said.weights == bytes_of(weights)
    sums = [grad.double() for grad in grads]  # over the packs of a step
    assert said.adapters == bytes_of([*adapters, *grads, *sums, *states])
    cache = row_cache(model, 24, 900, 100)
    assert said.cache == bytes_of([value for value in vars(cache).values() if isinstance(value, Tensor)][:2])


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_the_sums_are_of_their_parts_and_follow_the_flags(tmp_path: Path) -> None:
    values = {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1024,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))

    def said(*flags: str, memory: str = "--memory") -> dict[str, float]:
        command = [sys.executable, str(ITERATE), "--backbone", str(tmp_path), "--esconv", "x", memory, *flags]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {name.strip(): float(value) for value, name in re.findall(r"([\d.]+) GiB  (.*)", printed)}

    plain, lean = said(), said("--slots", "16", "--checkpoint-activations", "--dtype", "float32", "--rank", "16")
    for one in (plain, lean):
        training, rollout = ("activations of a packed row",), ("rollout cache", "prefill of prompts")
        for name, parts in (("training", training), ("rollout", rollout)):
            whole = one["weights"] + one["adapters with optimiser"] + sum(one[part] for part in parts)
            assert one[f"{name} together"] == pytest.approx(whole, abs=0.03)
    assert lean["weights"] == pytest.approx(2 * plain["weights"], abs=0.02)
    assert lean["rollout cache"] == pytest.approx(plain["rollout cache"], abs=0.02)  # half the slots, twice the bytes
    assert lean["activations of a packed row"] < plain["activations of a packed row"]
    assert plain["rollout cache"] == pytest.approx(2 * 4 * 256 * 32 * 2048 * 2 / GIB, abs=0.01)
    parts = said("--shard", memory="--memory=4")
    block, rest = 2 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024 + 2 * 512), 2 * (2 * 32000 * 512 + 512)
    assert plain["weights"] == pytest.approx((4 * block + rest) / GIB, abs=0.006)
    assert parts["weights"] == pytest.approx((block + 2 * block + rest) / GIB, abs=0.006)  # a quarter, and two gathered
