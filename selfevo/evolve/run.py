"""A run: its settings, its folder and its backbone."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from selfevo import __version__
from selfevo.files import read_json, write_json
from selfevo.generate.sampling import Sampling
from selfevo.models import ChatTokenizer, Transformer, load_model, load_tokenizer
from selfevo.training.step import SHUFFLES, TrainSettings


def option(default: Any, text: str, **more: Any) -> Any:
    """A field of a run's settings that the examples offer as a flag, with its help."""
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class RunConfig:
    """The settings that every run has; the values of Ye et al. (2025) are the defaults."""

    backbone: str = field(
        metadata={"help": "folder in Hugging Face layout, or a hub id: a Llama, Qwen2 or Mistral chat model"}
    )
    esconv: str = field(metadata={"help": "human dialogues to learn from (ESConv.json); split 9:1 by dialogue"})
    out: str = field(metadata={"help": "run folder"})
    test: str = option("", "test dialogues; without any, the tenth of ESConv that is held out")
    limit: int = option(0, "at most this many records of every file, for a quick try; 0 takes all")
    rank: int = option(8, "LoRA rank")
    alpha: float = option(16.0, "LoRA alpha")
    lora_dropout: float = option(0.0, "dropout on the adapters' input")
    sft_learning_rate: float = option(5e-6, "learning rate of SFT stages")
    learning_rate: float = option(5e-6, "learning rate of DPO stages")
    epochs: int = option(2, "epochs of every stage")
    batch_size: int = option(4, "items of a batch")
    accumulation: int = option(2, "batches of an optimiser step")
    warmup: float = option(0.01, "share of the steps over which the learning rate rises")
    weight_decay: float = option(0.0, "AdamW weight decay")
    max_grad_norm: float = option(1.0, "gradient clipping")
    evaluations_per_epoch: int = option(4, "evaluations on held-out items for early stopping")
    patience: int = option(3, "evaluations without improvement before a stage stops early")
    beta: float = option(0.1, "DPO beta")
    gamma: float = option(1.0, "weight of the SFT term beside DPO; 0 is plain DPO")
    temperature: float = option(0.9, "sampling temperature; 0 is greedy")
    top_p: float = option(0.8, "nucleus mass; 1 switches it off")
    top_k: int = option(50, "candidates per token; 0 switches it off")
    repetition_penalty: float = option(1.2, "repetition penalty over prompt and reply; 1 switches it off")
    max_new_tokens: int = option(128, "longest reply, in tokens")
    slots: int = option(32, "replies decoded at a time: more is faster, and on a CPU cheap; fewer take less memory")
    max_tokens: int = option(4096, "distinct tokens of one packed row; lower it where memory is short")
    shuffle: str = option(
        "dialogues", "what is shuffled: 'pairs' gives up sharing context across turns", choices=SHUFFLES
    )
    checkpoint_activations: bool = option(False, "recompute activations in the backward pass to save memory")
    seed: int = option(0, "seed of everything random")
    dtype: str = option(
        "auto", "weights: auto is bfloat16 on a GPU, float32 on a CPU", choices=("auto", "float32", "bfloat16")
    )
    device: str = option("auto", "auto takes a GPU where there is one")
    revision: str = option("", "revision of a hub id")
    chat_format: str = option("", "llama3, qwen2, mistral or plain, where the backbone's own template is unknown")

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_tokens", "rank", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("limit", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, not {self.beta}")
        self.sampling(0)
        self.training(self.learning_rate)
        self.training(self.sft_learning_rate)

    @property
    def data_files(self) -> tuple[str, ...]:
        """Every data file that the run reads."""
        return tuple(name for name in (self.esconv, self.test) if name)

    def sampling(self, salt: int) -> Sampling:
        """How replies are drawn; ``salt`` separates the stages' randomness."""
        seed = self.seed * 1_000_003 + salt
        return Sampling(self.temperature, self.top_p, self.top_k, self.repetition_penalty, seed)

    def training(self, learning_rate: float) -> TrainSettings:
        names: tuple[str, ...] = (
            "epochs",
            "batch_size",
            "accumulation",
            "warmup",
            "weight_decay",
            "max_grad_norm",
            "patience",
        )
        names += ("evaluations_per_epoch", "max_tokens", "shuffle", "seed")
        return TrainSettings(learning_rate=learning_rate, **{name: getattr(self, name) for name in names})


class RunError(ValueError):
    """A run folder that cannot be used; the message says why and what to do."""


def check_run(config: RunConfig, *, resume: bool) -> None:
    """Refuses, before anything is loaded or written, a run folder that is not this run's."""
    run = Path(config.out)
    if not (run / "config.json").is_file():
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise RunError(f"{run}: exists, but is not a run folder; choose another --out")
        return
    if not resume:
        raise RunError(f"{run}: already holds a run; continue it with --resume, or choose another --out")
    stored, current = read_json(run / "config.json"), _stamp(config)
    for name, value in current["settings"].items():
        known = stored.get("settings", {}).get(name)
        if name != "out" and value != known:
            message = f"holds a run with other settings ({name} was {known!r}, now {value!r}); choose another --out"
            raise RunError(f"{run}: {message}")
    for name, digest in current["data"].items():
        if stored.get("data", {}).get(name) != digest:
            raise RunError(f"{name}: has changed since {run} was started; choose another --out")


def open_run(config: RunConfig) -> Path:
    """The run folder: stamped with settings, data and versions where new, cleared of half-written files where old."""
    run = Path(config.out)
    for leftover in run.rglob("*.partial"):
        leftover.unlink()
    if not (run / "config.json").is_file():
        write_json(run / "config.json", _stamp(config))
    return run


def _stamp(config: RunConfig) -> dict[str, Any]:
    """Everything a run depends on: settings, the data files' hashes, versions."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    versions = {"selfevo": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "tokenizers", "safetensors", "numpy")}
    return {
        "settings": settings,
        "data": {name: _file_hash(name) for name in config.data_files},
        "versions": versions,
    }


def _file_hash(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        raise RunError(f"{path}: there is no such file; check the path")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_backbone(config: RunConfig) -> tuple[Transformer, ChatTokenizer]:
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        available = torch.device(device).type != "cuda" or torch.cuda.is_available()
    except RuntimeError as error:
        raise RunError(f"{device!r} is not a device: {str(error).splitlines()[0]}") from error
    if not available:
        raise RunError(f"the device {device!r} was asked for, but torch finds no GPU here")
    kind = config.dtype
    if kind == "auto":
        kind = "float32" if device == "cpu" else "bfloat16"
    revision = config.revision or None
    tokenizer = load_tokenizer(config.backbone, revision=revision, chat_format=config.chat_format or None)
    model = load_model(config.backbone, dtype=getattr(torch, kind), device=device, revision=revision)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise RunError(
            f"{config.backbone}: the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}"
        )
    model.checkpoint_activations = config.checkpoint_activations
    return model, tokenizer
