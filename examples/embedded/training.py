"""Trains the backbone from scratch: an initialisation that favours recall, two optimisers, short dialogues first.

A small model learns last what a reflection needs most: to look a fact up and to repeat it. Two things help it there.
Each attention layer starts near "attend to what is alike, pass it on unchanged", and the first rows are short.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from selfevo.files import replace_file
from selfevo.models import ChatTokenizer, ModelConfig, Transformer
from selfevo.trie import TreeContext, build_trie

from . import lessons

HEAD_SIZE = 32
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam
# Keeps log-sum-exp near 0, so that sure tokens have logits near 0. A repetition penalty multiplies and divides logits,
# and would else forbid a model with few certainties what a reflection is for: to repeat what the user said.
CENTRING = 2e-3
Row = list[tuple[list[int], list[int]]]  # prompt ids, answer ids


@dataclass(frozen=True)
class Settings:
    steps: int = 4600
    rows: int = 4
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    learning_rate: float = 3e-3  # of Adam, for the embedding and the norms
    matrix_rate: float = 0.01  # of Muon, for the matrices
    warmup: int = 50
    decay: float = 0.6  # share of the steps over which the rates fall
    seed: int = 0


def make_model(vocab_size: int, settings: Settings) -> Transformer:
    """A Llama with a shared embedding, freshly initialised."""
    torch.manual_seed(settings.seed)
    heads = settings.hidden_size // HEAD_SIZE
    config = ModelConfig(
        family="llama", vocab_size=vocab_size, hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size, num_layers=settings.layers, num_heads=heads, num_kv_heads=heads,
        head_dim=HEAD_SIZE, norm_eps=1e-5, rope_theta=10000.0, max_positions=1024,
        windows=(None,) * settings.layers, tied=True,
    )  # fmt: skip
    model = Transformer(config)
    width = settings.hidden_size
    for name, weight in model.named_parameters():
        kind = name.split(".")[-2]
        if kind == "embed_tokens":
            torch.nn.init.normal_(weight, std=0.2)
        elif kind == "q_proj":
            _favour_recall(model, name.removesuffix(".q_proj.weight"))
        elif kind in ("gate_proj", "up_proj"):
            torch.nn.init.normal_(weight, std=0.6 / math.sqrt(width))
        elif kind == "down_proj":
            torch.nn.init.normal_(weight, std=0.6 / math.sqrt(settings.intermediate_size * 2 * settings.layers))
    return model


@torch.no_grad()
def _favour_recall(model: Transformer, attention: str, gain: float = 0.7) -> None:
    """Queries like keys, and output times value near the identity (after Trockman and Kolter 2023)."""
    queries, keys, values, output = (model.get_parameter(f"{attention}.{part}_proj.weight") for part in "qkvo")
    alike, passed = (torch.linalg.qr(torch.randn(queries.shape))[0] * gain for _ in range(2))
    queries.copy_(alike)
    keys.copy_(alike)
    values.copy_(passed)
    output.copy_(passed.T)


def token_losses(model: Transformer, row: Row) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, targets and best guesses of all answer tokens of a row, whose shared contexts are computed once."""
    trie = build_trie([prompt + answer[:-1] for prompt, answer in row])
    nodes = np.concatenate([path[len(prompt) - 1 :] for path, (prompt, _) in zip(trie.paths, row)])
    targets = torch.tensor([token for _, answer in row for token in answer])
    hidden = model.hidden_states(trie.tokens[None], trie.positions[None], TreeContext(trie))[0]
    logits = model.lm_head(hidden[torch.from_numpy(nodes)])
    sizes = logits.logsumexp(dim=1)
    losses = sizes - logits.gather(1, targets[:, None])[:, 0] + CENTRING * sizes.square()
    return losses, targets, logits.detach().argmax(dim=1)


class Muon:
    """Momentum whose update is made orthogonal by Newton-Schulz iterations (Jordan et al. 2024), for matrices."""

    def __init__(self, matrices: Iterable[Tensor], momentum: float = 0.95) -> None:
        self.matrices, self.momentum = list(matrices), momentum
        self.buffers = [torch.zeros_like(matrix) for matrix in self.matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for matrix, buffer in zip(self.matrices, self.buffers):
            assert matrix.grad is not None
            buffer.lerp_(matrix.grad, 1 - self.momentum)
            update = orthogonal(matrix.grad.lerp(buffer, self.momentum))
            matrix.sub_(update, alpha=rate * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5)
            matrix.grad = None


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """A matrix with the same singular vectors and singular values near 1, by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


def schedule(step: int, settings: Settings) -> float:
    """The share of the full rates at a step: a linear rise, a plateau, a linear fall."""
    rise = min(1.0, (step + 1) / settings.warmup)
    return rise * min(1.0, max(0.01, (settings.steps - step) / (settings.decay * settings.steps)))


def train(
    tokenizer: ChatTokenizer,
    settings: Settings,
    checkpoint: Path,
    *,
    every: int = 250,
    watch: Callable[[Transformer, int], None] | None = None,
) -> Transformer:
    """The trained model. The state is kept in ``checkpoint`` every so often, and training continues from there.

    The rows of a step depend on the seed and the step alone, so a continued training ends with the same weights.
    """
    model = make_model(tokenizer.vocab_size, settings)
    embedding = model.model.embed_tokens.weight
    muon = Muon(p for p in model.parameters() if p.dim() == 2 and p is not embedding)
    adam = torch.optim.AdamW(
        [embedding, *(p for p in model.parameters() if p.dim() == 1)],
        lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0,
    )  # fmt: skip
    first = _resume(checkpoint, model, muon, adam, settings)
    mean = 0.0
    with tqdm(total=settings.steps, initial=first, desc="training", unit="step") as bar:
        for step in range(first, settings.steps):
            share = schedule(step, settings)
            adam.param_groups[0]["lr"] = share * settings.learning_rate
            loss = _backward(model, tokenizer, step, settings)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            muon.step(share * settings.matrix_rate)
            adam.step()
            adam.zero_grad(set_to_none=True)
            mean = loss if step == first else 0.98 * mean + 0.02 * loss
            bar.update()
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            if (step + 1) % every == 0 or step + 1 == settings.steps:
                _save(checkpoint, step + 1, model, muon, adam, settings)
                if watch is not None:
                    watch(model, step + 1)
    return model.eval()


def _backward(model: Transformer, tokenizer: ChatTokenizer, step: int, settings: Settings) -> float:
    """Adds up the gradient of the mean loss over all answer tokens of a step; returns that loss."""
    rng = Random(f"{settings.seed}-train-{step}")
    rows = [lessons.encode_row(tokenizer, lessons.make_row(rng, step / settings.steps)) for _ in range(settings.rows)]
    tokens = sum(len(answer) for row in rows for _, answer in row)
    total = 0.0
    for row in rows:
        loss = token_losses(model, row)[0].sum() / tokens
        loss.backward()
        total += loss.item()
    return total


def _save(
    path: Path, step: int, model: Transformer, muon: Muon, adam: torch.optim.Optimizer, settings: Settings
) -> None:
    state = {"step": step, "settings": vars(settings)}
    tensors = {name: tensor.detach() for name, tensor in _tensors(model, muon, adam).items()}
    with replace_file(path) as partial:
        save_file(tensors, partial, {"state": json.dumps(state)})


def _resume(path: Path, model: Transformer, muon: Muon, adam: torch.optim.Optimizer, settings: Settings) -> int:
    """The step to go on with."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
        if state["settings"] != vars(settings):
            raise ValueError(f"{path}: is of a training with other settings; remove it or choose another folder")
        for parameter in adam.param_groups[0]["params"]:
            moments = {name: torch.zeros_like(parameter) for name in _MOMENTS}
            adam.state[parameter] = {"step": torch.tensor(float(state["step"])), **moments}
        with torch.no_grad():
            for name, tensor in _tensors(model, muon, adam).items():
                tensor.copy_(file.get_tensor(name))
    return int(state["step"])


def _tensors(model: Transformer, muon: Muon, adam: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, momenta and moments, by name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors |= {f"momentum.{i}": buffer for i, buffer in enumerate(muon.buffers)}
    for i, parameter in enumerate(adam.param_groups[0]["params"]):
        tensors |= {f"{name}.{i}": adam.state[parameter][name] for name in _MOMENTS}
    return tensors
