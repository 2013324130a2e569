"""The loop: M0 by SFT with replay, then M(t+1) from M(t)'s own reflections, each scored on the test dialogues.

Every stage leaves its result under its final name only when it is whole, and starts from what is on disk: a killed run
that is resumed takes the same road and ends with the same adapters.
"""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from selfevo import __version__
from selfevo.corpus import Corpus, load_corpus, sft_objective
from selfevo.dialogue import Dialogue, Instruction
from selfevo.evaluate import comparison_table, evaluate_model
from selfevo.files import read_json, write_json, write_text
from selfevo.generate import Sampling
from selfevo.lora import freeze_adapter, inject_lora, load_adapter, remove_adapters
from selfevo.models import ChatTokenizer, Transformer, load_model, load_tokenizer
from selfevo.objectives import DPOObjective, PairIds, SFTObjective, fingerprint, reference_logps
from selfevo.prompts import REPLY_STYLES
from selfevo.refine import CONTROLS, SOURCES, Pair, RefineSettings, controlled, make_pairs
from selfevo.replies import fit_prompt
from selfevo.train import SHUFFLES, TrainSettings, train


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class EvolveConfig:
    """All settings of a run; the paper's values are the defaults. Each field is a flag of ``examples/iterate.py``."""

    backbone: str = field(
        metadata={"help": "folder in Hugging Face layout, or a hub id: a Llama, Qwen2 or Mistral chat model"}
    )
    esconv: str = field(metadata={"help": "human dialogues for phase 1 (ESConv.json); split 9:1 by dialogue"})
    out: str = field(metadata={"help": "run folder"})
    synthetic: tuple[str, ...] = _option(
        (), "seed dialogues for phase 2 (ExTES, ServeForEmo, ...); without any, ESConv"
    )
    replay: str = _option("", "general instructions to replay in phase 1 (Alpaca)")
    test: str = _option("", "test dialogues; without any, the tenth of ESConv that is held out")
    iterations: int = _option(2, "self-evolution iterations")
    limit: int = _option(0, "at most this many records of every file, for a quick try; 0 takes all")
    style: str = _option("strategies", "system prompt of replies", choices=REPLY_STYLES)
    chosen: str = _option(
        "refined", "where chosen replies come from: the model's refinement, or the seed dialogues", choices=SOURCES
    )
    control: str = _option(
        "none",
        "an experiment that should fail: chosen and rejected swapped, replies shuffled between users, or no DPO term",
        choices=CONTROLS,
    )
    rank: int = _option(8, "LoRA rank")
    alpha: float = _option(16.0, "LoRA alpha")
    lora_dropout: float = _option(0.0, "dropout on the adapters' input")
    sft_learning_rate: float = _option(5e-6, "learning rate of phase 1")
    learning_rate: float = _option(5e-6, "learning rate of phase 2")
    epochs: int = _option(2, "epochs of every stage")
    batch_size: int = _option(4, "items of a batch")
    accumulation: int = _option(2, "batches of an optimiser step")
    warmup: float = _option(0.01, "share of the steps over which the learning rate rises")
    weight_decay: float = _option(0.0, "AdamW weight decay")
    max_grad_norm: float = _option(1.0, "gradient clipping")
    evaluations_per_epoch: int = _option(4, "evaluations on held-out items for early stopping")
    patience: int = _option(3, "evaluations without improvement before a stage stops early")
    beta: float = _option(0.1, "DPO beta")
    gamma: float = _option(1.0, "weight of the SFT term beside DPO")
    replay_count: int = _option(500, "instructions to replay")
    temperature: float = _option(0.9, "sampling temperature; 0 is greedy")
    top_p: float = _option(0.8, "nucleus mass; 1 switches it off")
    top_k: int = _option(50, "candidates per token; 0 switches it off")
    repetition_penalty: float = _option(1.2, "repetition penalty over prompt and reply; 1 switches it off")
    max_new_tokens: int = _option(128, "longest reply, in tokens")
    reflection_tokens: int = _option(384, "longest reflection, in tokens")
    tries: int = _option(3, "tries for a usable reflection before the golden reply is used")
    slots: int = _option(32, "replies decoded at a time; lower it where memory is short")
    max_tokens: int = _option(4096, "distinct tokens of one packed row; lower it where memory is short")
    shuffle: str = _option(
        "dialogues", "what is shuffled: 'pairs' gives up sharing context across turns", choices=SHUFFLES
    )
    checkpoint_activations: bool = _option(False, "recompute activations in the backward pass to save memory")
    seed: int = _option(0, "seed of everything random")
    dtype: str = _option(
        "auto", "weights: auto is bfloat16 on a GPU, float32 on a CPU", choices=("auto", "float32", "bfloat16")
    )
    device: str = _option("auto", "auto takes a GPU where there is one")
    revision: str = _option("", "revision of a hub id")
    chat_format: str = _option("", "llama3, qwen2, mistral or plain, where the backbone's own template is unknown")

    def __post_init__(self) -> None:
        for name in ("iterations", "max_new_tokens", "reflection_tokens", "tries", "max_tokens", "rank", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("limit", "replay_count", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")
        for name, known in (("style", REPLY_STYLES), ("chosen", SOURCES), ("control", CONTROLS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} should be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, not {self.beta}")
        self.replies(0)
        self.training(self.learning_rate)
        self.training(self.sft_learning_rate)

    def replies(self, salt: int) -> RefineSettings:
        """How replies and reflections are drawn; ``salt`` separates the stages' randomness."""
        seed = self.seed * 1_000_003 + salt
        return RefineSettings(
            Sampling(self.temperature, self.top_p, self.top_k, self.repetition_penalty, seed),
            self.max_new_tokens, self.reflection_tokens, self.tries, self.style, self.chosen, self.slots,
        )  # fmt: skip

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


def evolve(config: EvolveConfig, *, resume: bool = False) -> Path:
    """Runs, or with ``resume`` continues, the whole loop; returns the run folder (its layout is in the README)."""
    check_run(config, resume=resume)
    corpus = read_corpus(config)
    model, tokenizer = load_backbone(config)
    run = open_run(config)
    write_json(run / "data.json", corpus.report())
    _acquire(config, model, tokenizer, corpus, run / "M0")
    scores = {"M0": _evaluate(config, model, tokenizer, corpus, run, "M0")}
    for iteration in range(1, config.iterations + 1):
        _improve(config, model, tokenizer, corpus, run, iteration)
        name = f"M{iteration}"
        scores[name] = _evaluate(config, model, tokenizer, corpus, run, name)
    table = comparison_table(scores)
    write_text(run / "eval" / "table.md", table + "\n")
    write_json(run / "eval" / "scores.json", scores)
    return run


def check_run(config: EvolveConfig, *, resume: bool) -> None:
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


def open_run(config: EvolveConfig) -> Path:
    """The run folder: stamped with settings, data and versions where new, cleared of half-written files where old."""
    run = Path(config.out)
    for leftover in run.rglob("*.partial"):
        leftover.unlink()
    if not (run / "config.json").is_file():
        write_json(run / "config.json", _stamp(config))
    return run


def _stamp(config: EvolveConfig) -> dict[str, Any]:
    """Everything a run depends on: settings, the data files' hashes, versions."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    files = [name for name in (config.esconv, *config.synthetic, config.replay, config.test) if name]
    versions = {"selfevo": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "tokenizers", "safetensors", "numpy")}
    return {"settings": settings, "data": {name: _file_hash(name) for name in files}, "versions": versions}


def read_corpus(config: EvolveConfig) -> Corpus:
    """The dialogues of a run, read, cleaned and split."""
    return load_corpus(
        esconv=config.esconv, synthetic=config.synthetic, replay=config.replay, test=config.test,
        iterations=config.iterations, limit=config.limit, replay_count=config.replay_count, seed=config.seed,
    )  # fmt: skip


def load_backbone(config: EvolveConfig) -> tuple[Transformer, ChatTokenizer]:
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


def _is_trained(folder: Path) -> bool:
    """Whether a stage's adapter is whole: its configuration is written last, then the checkpoint is removed."""
    return (folder / "adapter_config.json").is_file() and not (folder / "checkpoint.pt").is_file()


def _restore(model: Transformer, folder: Path) -> None:
    """Puts exactly M(t) into the model, always from disk, so that a resumed run computes with the same numbers."""
    remove_adapters(model)
    load_adapter(model, folder)


def _acquire(config: EvolveConfig, model: Transformer, tokenizer: ChatTokenizer, corpus: Corpus, folder: Path) -> None:
    """Phase 1: experience acquisition, SFT with replay."""
    if _is_trained(folder):
        return
    counts: Counter[str] = Counter()

    def objective(dialogues: list[Dialogue], replay: list[Instruction]) -> SFTObjective:
        window = model.config.max_positions
        return sft_objective(
            tokenizer, dialogues, replay, style=config.style, window=window, max_tokens=config.max_tokens, counts=counts
        )

    items = objective(corpus.train, corpus.replay)
    held_out = objective(corpus.held_out, []) if corpus.held_out else None
    write_json(folder / "sft.json", dict(sorted(counts.items())))
    inject_lora(model, config.rank, config.alpha, config.lora_dropout, seed=config.seed)
    settings = config.training(config.sft_learning_rate)
    train(
        model,
        items,
        folder,
        settings,
        held_out=held_out,
        base_model=config.backbone,
        label="M0: learning from human dialogues",
    )


def _improve(
    config: EvolveConfig, model: Transformer, tokenizer: ChatTokenizer, corpus: Corpus, run: Path, iteration: int
) -> None:
    """Phase 2, one iteration: pairs from the model's own reflections, then DPO + gamma * SFT against itself."""
    start, folder = run / f"M{iteration - 1}", run / f"M{iteration}"
    if _is_trained(folder):
        return
    _restore(model, start)
    part = corpus.seeds[iteration - 1]
    pairs = make_pairs(model, tokenizer, part.examples, folder, config.replies(iteration))
    kept, ids = _encode_pairs(tokenizer, controlled(pairs, config.control), model.config.max_positions)
    if not ids:
        raise RunError(f"{folder}: no preference pair was left; {folder / 'filter.json'} says what became of them")
    freeze_adapter(
        model, rank=config.rank, alpha=config.alpha, dropout=config.lora_dropout, seed=config.seed + iteration
    )
    reference = _reference(config, model, ids, folder / "reference.json")
    held = [i for i, pair in enumerate(kept) if pair.dialogue in part.held_out]
    trained = [i for i, pair in enumerate(kept) if pair.dialogue not in part.held_out]
    if not trained:
        held, trained = [], held

    def objective(members: list[int]) -> DPOObjective | SFTObjective:
        own, groups = [ids[i] for i in members], [kept[i].dialogue for i in members]
        if config.control == "sft-only":
            return SFTObjective([(pair.prompt, pair.chosen) for pair in own], groups, config.max_tokens)
        return DPOObjective(own, reference[members], groups, config.max_tokens, config.beta, config.gamma)

    train(
        model,
        objective(trained),
        folder,
        replace(config.training(config.learning_rate), seed=config.seed + iteration),
        held_out=objective(held) if held else None,
        base_model=config.backbone,
        label=f"M{iteration}: preferring refined replies",
    )


def _encode_pairs(tokenizer: ChatTokenizer, pairs: list[Pair], window: int) -> tuple[list[Pair], list[PairIds]]:
    """Pairs as ids; one that cannot fit into the window even without its older turns is left out."""
    kept, ids = [], []
    for pair in pairs:
        chosen, rejected = tokenizer.encode_reply(pair.chosen), tokenizer.encode_reply(pair.rejected)
        prompt = fit_prompt(tokenizer, pair.prompt, window - max(len(chosen), len(rejected)))
        if prompt.ids is not None:
            kept.append(pair)
            ids.append(PairIds(prompt.ids, chosen, rejected))
    return kept, ids


def _reference(config: EvolveConfig, model: Transformer, pairs: list[PairIds], path: Path) -> torch.Tensor:
    """The reference log-probabilities, computed once and stored with what they were computed from."""
    mark = fingerprint(model, pairs)
    if path.is_file():
        stored = read_json(path)
        if stored["fingerprint"] != mark:
            raise RunError(f"{path}: was computed with another model or other pairs; remove it to compute it again")
        return torch.tensor([stored["chosen"], stored["rejected"]], dtype=torch.float32).T.contiguous()
    reference = reference_logps(model, pairs, config.max_tokens)
    write_json(path, {"fingerprint": mark, "chosen": reference[:, 0].tolist(), "rejected": reference[:, 1].tolist()})
    return reference


def _evaluate(
    config: EvolveConfig, model: Transformer, tokenizer: ChatTokenizer, corpus: Corpus, run: Path, name: str
) -> dict[str, float]:
    folder = run / "eval"
    if not (folder / f"{name}.json").is_file():
        _restore(model, run / name)
    return evaluate_model(model, tokenizer, corpus.test, folder, name, config.replies(0))


def _file_hash(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        raise RunError(f"{path}: there is no such file; check the path")
    return hashlib.sha256(path.read_bytes()).hexdigest()
