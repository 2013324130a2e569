"""The rule by which one seed is derived from another."""

from __future__ import annotations

import hashlib
import json


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed in 0..2^63-1 for the purpose that the names say; other names or another ``seed`` give another one.

    The rule is stable: the first 63 bits of the SHA-256 digest of the JSON list ``[seed, *names]``. The names in use:

    ====================================  ==============================================================================
    of a run's seed
    ``"split", "test"``                   human dialogues, 9:1
    ``"split", "held-out"``               the training dialogues, 9:1, where no file of test dialogues is given
    ``"split", "seeds"``                  the seed dialogues, one part per iteration
    ``"split", "seeds", t, "held-out"``   the part of iteration t, 9:1
    ``"replay"``                          the choice of instructions to replay
    ``"training", STAGE``                 a stage of training (``M0``, ``planner-dpo``, ...)
    ``"replies", STAGE``                  the replies and reflections that a stage learns from
    ``"replies", "test"``                 answers to the test turns: the same draws for every model
    ``"plans", STAGE``                    the plans that a stage learns from
    ``"plans", "test"``                   plans for the test turns
    ``"judge"``                           a local judge
    ``"chat"``                            a conversation in the terminal
    ``"study", "block", n``               the models of the n-th block of a study's places
    ``"study", "scenarios", n``           its scenarios, likewise
    ``"study", "sides", place, turn``     the sides of a turn
    ``"study"``                           the draws of all replies in a study
    ``"study", "reply", place, turn, X``  the key of the reply on side X
    ``"study", "judged", conversation``   which of its replies a judge sees
    of a training stage's seed
    ``"adapter"``                         the initial weights of its adapter
    ``"order", epoch``                    the order of an epoch's items
    ``"dropout", step, pack``             dropout in a packed row of a step
    of a rollout's seed
    ``"reflection", attempt``             an attempt at a reflection, repeated if the reflection is unusable
    ``"attempt", attempt``                an attempt at a local judge's answer, repeated if the answer is unusable
    ====================================  ==============================================================================
    """
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
