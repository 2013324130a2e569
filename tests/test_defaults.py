"""The defaults of public functions are part of the contract: other code relies on them without naming them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from selfevo import metrics
from selfevo.dialogue import reply_examples
from selfevo.generate import generate
from selfevo.lora import freeze_adapter, inject_lora
from selfevo.losses import dpo_loss, dpo_sft_loss, sequence_logps
from selfevo.models import ChatTokenizer, load_model, load_tokenizer

DEFAULTS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (dpo_sft_loss, {"chosen_lengths": None, "beta": 0.1, "gamma": 1.0}),
    (dpo_loss, {"beta": 0.1}),
    (sequence_logps, {"ignore_index": -100}),
    (inject_lora, {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": None, "seed": 0}),
    (freeze_adapter, {"rank": None, "alpha": None, "dropout": None, "seed": 0}),
    (
        generate,
        {
            "stop_ids": (), "temperature": 0.9, "top_p": 0.8, "top_k": 50, "repetition_penalty": 1.2, "seed": 0,
            "keys": None, "stop_when": None, "on_reply": None, "progress": None, "cuda_graphs": False,
        },
    ),
    (load_model, {"dtype": None, "device": "cpu", "revision": None, "allow_unknown": ()}),
    (load_tokenizer, {"revision": None, "chat_format": None}),
    (ChatTokenizer.encode_chat, {"add_generation_prompt": True}),
    (metrics.bleu, {"max_n": 4, "level": "corpus", "smoothing": None, "effective_order": None}),
    (metrics.distinct_n, {"level": "corpus"}),
    (metrics.rouge_l, {"beta": 1.0, "tokenize": metrics.tokenize_words}),
    (metrics.meteor, {"stem": None, "synonyms": None, "tokenize": metrics.tokenize_13a}),
    (reply_examples, {"skip_first": 1, "skip_last": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("function", "defaults"), DEFAULTS, ids=lambda value: getattr(value, "__qualname__", ""))
def test_defaults_are_the_published_ones(function: Callable[..., Any], defaults: dict[str, Any]) -> None:
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in defaults} == defaults
