"""One rule for every seed that is derived from another (standard library only)."""

from __future__ import annotations

import hashlib
import json


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed in 0..2^63-1 that is named after what it is for; other names, or another seed, give another one.

    The rule is stable: the first 63 bits of the SHA-256 digest of the JSON list ``[seed, *names]``. The names in use:

    ====================================  ==============================================================================
    of a run's seed
    ``"split", "test"``                   human dialogues, 9:1
    ``"split", "held-out"``               the training dialogues, 9:1, where no file of test dialogues is given
    ``"split", "seeds"``                  the seed dialogues, one part per iteration
    ``"split", "seeds", t, "held-out"``   the part of iteration t, 9:1
    ``"replay"``                          which instructions are replayed
    ``"training", STAGE``                 a stage of training (``M0``, ``planner-dpo``, ...)
    ``"replies", STAGE``                  the replies and reflections that a stage learns from
    ``"replies", "test"``                 answers to the test turns: the same draws for every model
    ``"plans", STAGE``                    the plans that a stage learns from
    ``"plans", "test"``                   plans for the test turns
    ``"judge"``                           a local judge
    ``"chat"``                            a conversation in the terminal
    of a training stage's seed
    ``"adapter"``                         the first values of its adapter
    ``"order", epoch``                    the order of an epoch's items
    ``"dropout", step``                   dropout during a step
    of a rollout's seed
    ``"reflection", attempt``             asking for a reflection, once more where none could be used
    ``"attempt", attempt``                asking a local judge, once more where its answer could not be used
    ====================================  ==============================================================================
    """
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
