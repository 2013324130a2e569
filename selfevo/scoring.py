"""Log-probabilities of replies: token trie, model, chunked output head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from selfevo.kernels.head import linear_logps
from selfevo.models.transformer import Transformer
from selfevo.trie.attention import TreeContext
from selfevo.trie.packing import pack
from selfevo.trie.trie import as_ids, build_trie

Example = tuple[Sequence[int], Sequence[int]]  # prompt ids, response ids
MAX_TOKENS = 4096  # of one packed row: attention is quadratic in it, the rest of the work linear


def response_logps(
    model: Transformer, examples: Sequence[Example], *, max_tokens: int = MAX_TOKENS
) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of responses given their prompts: ``[(prompt_ids, response_ids)]`` -> (N,), (N,).

    Returns the float32 sums, differentiable, and the responses' lengths (int64). Whatever prefixes the examples share
    is computed once; values and gradients are those of one sequence at a time. ``max_tokens`` bounds the distinct
    tokens of one packed row. Raises ValueError for an empty prompt or response.
    """
    check_examples(examples, model.config.vocab_size)
    sequences = [[as_ids([*prompt, *response])] for prompt, response in examples]
    sums: list[Tensor] = []
    order: list[int] = []
    for members in pack(sequences, max_tokens):
        sums.append(_row_logps(model, [examples[index] for index in members]))
        order += members
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order)] = torch.arange(len(order))
    lengths = torch.tensor([len(response) for _, response in examples], device=model.device)
    return torch.cat(sums)[back.to(model.device)], lengths


def packed_logps(model: Transformer, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """What ``response_logps`` returns, of examples that have been packed already: all of them are one packed row,
    however many tokens that has."""
    check_examples(examples, model.config.vocab_size)
    lengths = torch.tensor([len(response) for _, response in examples], device=model.device)
    return _row_logps(model, examples), lengths


def _row_logps(model: Transformer, examples: Sequence[Example]) -> Tensor:
    """One packed row. The last id of a sequence is only ever a target, so it is no node of the trie."""
    trie = build_trie([[*prompt, *response[:-1]] for prompt, response in examples])
    device = model.device
    tokens, positions = trie.tokens.to(device)[None], trie.positions.to(device)[None]
    hidden = model.hidden_states(tokens, positions, TreeContext(trie, device))[0]
    rows = np.concatenate([path[len(prompt) - 1 :] for path, (prompt, _) in zip(trie.paths, examples)])
    targets = np.concatenate([as_ids(response) for _, response in examples])
    owners = np.repeat(np.arange(len(examples)), [len(response) for _, response in examples])
    scored = hidden[torch.from_numpy(rows).to(device)]
    logps = linear_logps(scored, model.lm_head.weight, torch.from_numpy(targets).to(device))
    zeros = torch.zeros(len(examples), dtype=logps.dtype, device=device)
    return zeros.index_add(0, torch.from_numpy(owners).to(device), logps)


def check_examples(examples: Sequence[Example], vocab_size: int) -> None:
    """Refuses, by index, what cannot be scored."""
    if not examples:
        raise ValueError("there are no examples to score")
    for index, (prompt, response) in enumerate(examples):
        if len(prompt) == 0 or len(response) == 0:
            side = "prompt" if len(prompt) == 0 else "response"
            raise ValueError(f"example {index}: its {side} has no tokens")
        largest, smallest = max(max(prompt), max(response)), min(min(prompt), min(response))
        if largest >= vocab_size or smallest < 0:
            raise ValueError(
                f"example {index}: token ids should lie in 0..{vocab_size - 1}, found {smallest}..{largest}"
            )
