"""A run: its settings, its folder and its backbone."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch

from selfevo import __version__
from selfevo.datasets.corpus import HumanData
from selfevo.datasets.seeds import derive_seed
from selfevo.evolve.settings import compose, flatten, leaves
from selfevo.files import FileError, file_hash, read_json, write_json
from selfevo.generate.replies import ReplySettings
from selfevo.models import ChatTokenizer, Transformer, load_model, load_tokenizer
from selfevo.training.settings import AdapterSettings, PreferenceSettings, TrainSettings
from selfevo.training.stages import Stage

DTYPES = ("auto", "float32", "bfloat16")
DRAWS = 2  # how seeds are derived; a run that was begun under another rule cannot be continued
S = TypeVar("S")


@dataclass(frozen=True)
class BackboneSettings:
    """The chat model that everything starts from, and how it is loaded."""

    source: Annotated[
        str, "folder in Hugging Face layout, or a hub id: a Llama, Qwen2 or Mistral chat model", "backbone"
    ]
    checkpoint_activations: Annotated[bool, "recompute activations in the backward pass to save memory"] = False
    dtype: Annotated[str, "weights: auto is bfloat16 on a GPU, float32 on a CPU", DTYPES] = "auto"
    device: Annotated[str, "auto takes a GPU where there is one"] = "auto"
    revision: Annotated[str, "revision of a hub id"] = ""
    chat_format: Annotated[str, "llama3, qwen2, mistral or plain, in place of the backbone's own template"] = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype should be one of {', '.join(DTYPES)}, not {self.dtype!r}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings that every run has; the values of Ye et al. (2025) are the defaults."""

    backbone: BackboneSettings
    data: HumanData
    out: Annotated[str, "run folder"]
    adapter: AdapterSettings = AdapterSettings()
    sft_learning_rate: Annotated[float, "learning rate of SFT stages"] = TrainSettings.learning_rate
    training: TrainSettings = TrainSettings()
    preference: PreferenceSettings = PreferenceSettings()
    replies: ReplySettings = ReplySettings()
    seed: Annotated[int, "seed of everything random"] = 0

    def __post_init__(self) -> None:
        replace(self.training, learning_rate=self.sft_learning_rate)  # raises where it is out of range
        if self.training.seed or self.replies.sampling.seed:
            raise ValueError("a run has one seed, from which those of training and sampling are derived; set that one")

    @property
    def results(self) -> tuple[str, ...]:
        """The files of the run folder without which the run is not finished."""
        raise NotImplementedError

    def stage(self, name: str, label: str, *, sft: bool) -> Stage:
        """A stage of training, in the folder of its name."""
        rate = self.sft_learning_rate if sft else self.training.learning_rate
        training = replace(self.training, learning_rate=rate, seed=derive_seed(self.seed, "training", name))
        return Stage(Path(self.out) / name, label, self.backbone.source, self.adapter, training)


class RunError(ValueError):
    """A run folder that cannot be used; the message says why and what to do."""


def read_settings(run: Path, kind: type[S]) -> S:
    """The settings of a run folder, of this version or another: those that ``kind`` has, others are ignored."""
    path = run / "config.json"
    stored = read_json(path)
    if not isinstance(stored, dict) or not isinstance(stored.get("settings"), dict):
        raise FileError(f"{path}: has no settings; it is not of a run")
    try:
        return compose(kind, stored["settings"])
    except (TypeError, ValueError) as error:
        raise FileError(f"{path}: {error}") from error


def is_finished(config: RunConfig) -> bool:
    """Whether the run has all its results, so that nothing is left to be done."""
    return all((Path(config.out) / name).is_file() for name in config.results)


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
    _compare_settings(run, stored.get("settings", {}), current["settings"], type(config))
    for name, digest in current["data"].items():
        if stored.get("data", {}).get(name) != digest:
            raise RunError(f"{name}: has changed since {run} was started; choose another --out")
    if stored.get("draws") != DRAWS and not is_finished(config):
        was = stored.get("versions", {}).get("selfevo", "another version")
        raise RunError(
            f"{run}: was begun by selfevo {was}, which splits data and draws replies differently; finish it there, or "
            "choose another --out"
        )


def _compare_settings(run: Path, stored: dict[str, Any], current: dict[str, Any], kind: type) -> None:
    """A setting that the run's version did not have must have its default; one that we do not have must be off."""
    for name, leaf in leaves(kind).items():
        known = stored.get(name, _as_json(leaf.default))
        if name != "out" and current[name] != known:
            message = f"holds a run with other settings ({name} was {known!r}, now {current[name]!r})"
            raise RunError(f"{run}: {message}; choose another --out")
    unknown = sorted(name for name in set(stored) - set(current) if stored[name] not in (None, False, 0, "", []))
    if unknown:
        raise RunError(f"{run}: holds a run with settings unknown to this version ({', '.join(unknown)})")


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
    versions = {"selfevo": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "tokenizers", "safetensors", "numpy")}
    return {
        "settings": {name: _as_json(value) for name, value in flatten(config).items()},
        "data": {name: file_hash(name) for name in config.data.files},
        "versions": versions,
        "draws": DRAWS,
    }


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def load_backbone(settings: BackboneSettings) -> tuple[Transformer, ChatTokenizer]:
    """The model, on its device, and its tokenizer. Raises RunError for a device that is not there, and where the two do
    not fit together."""
    source, revision = settings.source, settings.revision or None
    device = _device(settings.device)
    kind = settings.dtype
    if kind == "auto":
        kind = "float32" if device == "cpu" else "bfloat16"
    tokenizer = load_tokenizer(source, revision=revision, chat_format=settings.chat_format or None)
    model = load_model(source, dtype=getattr(torch, kind), device=device, revision=revision)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise RunError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}"
        )
    model.checkpoint_activations = settings.checkpoint_activations
    return model, tokenizer


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        available = torch.device(name).type != "cuda" or torch.cuda.is_available()
    except RuntimeError as error:
        raise RunError(f"{name!r} is not a device: {str(error).splitlines()[0]}") from error
    if not available:
        raise RunError(f"the device {name!r} was requested, but torch finds no GPU here")
    return name
