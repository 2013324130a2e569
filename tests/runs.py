"""A small world to run in: a tiny backbone, dialogues, a configuration, and a run that is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from conftest import tiny_model

from selfevo.evolve import EvolveConfig, evolve
from selfevo.evolve.settings import compose, flatten
from selfevo.models import load_tokenizer, save_pretrained

ITERATE = Path(__file__).resolve().parents[1] / "examples" / "iterate.py"
MARKERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SMALL: dict[str, Any] = {
    "epochs": 1, "max_new_tokens": 12, "reflection_tokens": 16, "tries": 2, "learning_rate": 1e-3,
    "sft_learning_rate": 1e-3, "style": "vanilla", "batch_size": 2, "accumulation": 1,
}  # fmt: skip


def dialogue(number: int, turns: int = 6) -> dict[str, Any]:
    said = []
    for turn in range(turns):
        said.append({"speaker": "seeker", "annotation": {}, "content": f"I feel worse today, {number} and {turn}."})
        said.append(
            {"speaker": "supporter", "annotation": {"strategy": "Question"}, "content": f"Why is {turn} so hard?"}
        )
    return {"dialog": said, "emotion_type": "sadness", "problem_type": "job", "situation": "s"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama-3-format checkpoint with a byte tokenizer, and small files in the public formats."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=MARKERS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([], trainer)
    backbone = folder / "backbone"
    backbone.mkdir()
    tokenizer.save(str(backbone / "tokenizer.json"))
    settings = {"bos_token": MARKERS[0], "eos_token": MARKERS[4]}
    (backbone / "tokenizer_config.json").write_text(json.dumps(settings))
    model = tiny_model(vocab_size=tokenizer.get_vocab_size(), max_positions=2048)
    save_pretrained(model, load_tokenizer(backbone), backbone)
    esconv = [dialogue(number) for number in range(10)]
    (folder / "esconv.json").write_text(json.dumps(esconv))
    (folder / "test.json").write_text(json.dumps(esconv[:2]))
    turns = [{"User": "I am sad."}, {"AI Strategy": "", "AI": "Tell me more."}] * 5
    synthetic = [{"scene": "s", "description": "d", "content": turns} for _ in range(20)]
    (folder / "extes.json").write_text(json.dumps(synthetic))
    replay = [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(5)]
    (folder / "alpaca.json").write_text(json.dumps(replay))
    return folder


def configuration(world: Path, out: Path, **changes: Any) -> EvolveConfig:
    """Settings by the names of their leaves."""
    paths = {"backbone": str(world / "backbone"), "esconv": str(world / "esconv.json"), "out": str(out)}
    paths |= {"test": str(world / "test.json"), "replay": str(world / "alpaca.json")}
    return compose(EvolveConfig, paths | {"synthetic": (str(world / "extes.json"),)} | SMALL | changes)


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evolve(configuration(world, tmp_path_factory.mktemp("runs") / "finished"))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def flags(config: EvolveConfig) -> list[str]:
    """The flags that ask for what ``configuration`` made."""
    values = flatten(config)
    given: list[str] = []
    for name in ("backbone", "esconv", "out", "test", "replay", "synthetic", *SMALL):
        value = values[name]
        given += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,))]
    return given
