"""What several tests compare with: examples whose contexts grow, and log-probabilities one sequence at a time."""

from __future__ import annotations

import torch

from selfevo.models import Transformer

Examples = list[tuple[list[int], list[int]]]


def dialogue_examples(seed: int = 0, vocab: int = 61) -> Examples:
    """Two dialogues whose contexts grow turn by turn, two replies after each, one pair of replies equal, one stray."""
    generator = torch.Generator().manual_seed(seed)

    def some(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, vocab, (length,), generator=generator).tolist()

    examples: Examples = []
    system = some(5, 6)
    for _ in range(2):
        context = list(system)
        for _ in range(3):
            context = context + some(2, 6)
            chosen, rejected = some(1, 7), some(1, 7)
            examples += [(context, chosen), (context, rejected)]
            context = context + chosen
    return [*examples, examples[3], (some(1, 2), some(1, 3))]


def one_at_a_time(model: Transformer, examples: Examples) -> torch.Tensor:
    """The naive oracle: full logits of each sequence by itself."""
    sums = []
    for prompt, response in examples:
        logits = model(torch.tensor([[*prompt, *response]]))[0].double()
        logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        sums.append(logps.gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(sums)
