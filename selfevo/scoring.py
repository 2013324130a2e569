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
MAX_TOKENS = 4096  # of one packed row: attention is quadratic in it, all other work linear


def response_logps(
    model: Transformer, examples: Sequence[Example], *, max_tokens: int = MAX_TOKENS
) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of responses given their prompts: ``[(prompt_ids, response_ids)]`` -> (N,), (N,).

    Returns the float32 sums, differentiable, and the responses' lengths (int64). Prefixes that examples share are
    computed once; values and gradients are those of one sequence at a time. ``max_tokens`` bounds the distinct tokens
    of one packed row. Raises ValueError for an empty prompt or response and for ids outside the vocabulary.
    """
    _check_examples(examples, model.config.vocab_size)
    rows = list(pack([[as_ids([*prompt, *response])] for prompt, response in examples], max_tokens))
    packed = [packed_logps(model, [examples[index] for index in members]) for members in rows]
    order = torch.tensor([index for members in rows for index in members], device=model.device).argsort()
    return torch.cat([sums for sums, _ in packed])[order], torch.cat([lengths for _, lengths in packed])[order]


def packed_logps(model: Transformer, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Like ``response_logps``, for examples that were packed before: all are one packed row, whatever its length."""
    _check_examples(examples, model.config.vocab_size)
    device = model.device
    # The last id of a sequence is only ever a target, so it is no node of the trie.
    trie = build_trie([[*prompt, *response[:-1]] for prompt, response in examples])
    tokens, positions = trie.tokens.to(device)[None], trie.positions.to(device)[None]
    hidden = model.hidden_states(tokens, positions, TreeContext(trie, device))[0]
    rows = np.concatenate([path[len(prompt) - 1 :] for path, (prompt, _) in zip(trie.paths, examples)])
    targets = np.concatenate([as_ids(response) for _, response in examples])
    scored = hidden[torch.from_numpy(rows).to(device)]
    logps = linear_logps(scored, model.lm_head.weight, torch.from_numpy(targets).to(device))
    lengths = torch.tensor([len(response) for _, response in examples], device=device)
    owners = torch.arange(len(examples), device=device).repeat_interleave(lengths, output_size=len(targets))
    return logps.new_zeros(len(examples)).index_add(0, owners, logps), lengths


def _check_examples(examples: Sequence[Example], vocab_size: int) -> None:
    """Raises ValueError that names the first example that cannot be scored."""
    if not examples:
        raise ValueError("there are no examples to score")
    for index, (prompt, response) in enumerate(examples):
        if len(prompt) == 0 or len(response) == 0:
            side = "prompt" if len(prompt) == 0 else "response"
            raise ValueError(f"example {index}: its {side} has no tokens")
        largest, smallest = max(*prompt, *response), min(*prompt, *response)
        if largest >= vocab_size or smallest < 0:
            raise ValueError(
                f"example {index}: token ids should lie in 0..{vocab_size - 1}, found {smallest}..{largest}"
            )
