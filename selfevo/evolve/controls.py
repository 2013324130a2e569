"""Control experiments: pairs changed so that the effect should vanish."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from selfevo.datasets.pairs import Pair

CONTROLS = ("none", "swapped", "shuffled", "sft-only")


def controlled(pairs: Sequence[Pair], control: str) -> list[Pair]:
    """The pairs as a control experiment needs them, in the same order and with the same prompts.

    "swapped" prefers the first reply to the refined one. "shuffled" gives each prompt both replies of a pair of another
    dialogue, so that what they say about a user is about somebody else. "none" and "sft-only" leave them as they are.
    """
    if control == "swapped":
        return [replace(pair, chosen=pair.rejected, rejected=pair.chosen, rejected_cut=False) for pair in pairs]
    if control == "shuffled":
        order = sorted(range(len(pairs)), key=lambda i: pairs[i].dialogue)
        step = max(Counter(pair.dialogue for pair in pairs).values())  # no dialogue reaches as far
        if 2 * step > len(pairs):
            raise ValueError(
                f"pairs of at least two dialogues are needed to shuffle them; there are {len(pairs)} pairs"
            )
        donors = dict(zip(order, order[step:] + order[:step]))
        given = [pairs[donors[index]] for index in range(len(pairs))]
        return [
            replace(pair, chosen=donor.chosen, rejected=donor.rejected, rejected_cut=donor.rejected_cut)
            for pair, donor in zip(pairs, given)
        ]
    return list(pairs)
