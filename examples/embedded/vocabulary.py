"""The backbone's tokenizer: a byte-level BPE in which every word of the world is one token.

The prompts of the library are constant, so each of their lines is one token too (added to the vocabulary, and text like
any other): a context then costs what was said in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from selfevo.datasets.prompts import SELF_REFLECTION, prompts_of
from selfevo.models.llama import Llama3Chat

from . import lessons
from . import words as w

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_PIECES = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+(?: [^\sA-Za-z0-9]+)*|\s+"
SIZE = 2300


def prompt_lines() -> list[str]:
    """The lines of the library's prompts and of the voices, each once."""
    texts = [prompts_of(style).system for style in (*lessons.STYLES, SELF_REFLECTION)]
    lines = "\n".join([*texts, prompts_of(SELF_REFLECTION).refine, *lessons.VOICES]).split("\n")
    return list(dict.fromkeys(lines))


def _corpus(seed: int) -> list[str]:
    rng = Random(f"{seed}-tokenizer")
    texts = [f" {value}" for values in w.FACTS.values() for value in values] * 200
    texts += ["system", "user", "assistant", "\n\n", "\n"] * 500
    for _ in range(1500):
        for prompt, answer in lessons.make_row(rng, 1.0):
            texts += [message["content"] for message in prompt[1:] if message["role"] != "system"] + [answer]
    lines = prompt_lines()
    return [text for text in texts if not any(line in text for line in lines)]


def make_tokenizer(folder: Path, seed: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json; the chat format follows from the control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    tokenizer.add_tokens([AddedToken(line, special=False, normalized=False) for line in prompt_lines()])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": SPECIAL[0], "eos_token": Llama3Chat.markers[3], "model_max_length": 1024,
        "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
