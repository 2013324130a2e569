"""A run: its settings and its backbone. Its folder is in ``run_folder.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import torch

from selfevo.datasets.corpus import HumanData
from selfevo.datasets.seeds import derive_seed
from selfevo.generate.replies import ReplySettings
from selfevo.kernels import ranks
from selfevo.models import ChatTokenizer, Transformer, load_model, load_tokenizer
from selfevo.training.settings import AdapterSettings, PreferenceSettings, TrainSettings
from selfevo.training.stages import Stage

DTYPES = ("auto", "float32", "bfloat16")
C = TypeVar("C", bound="RunConfig")


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
    shard: Annotated[bool, "under torchrun: every process keeps a part of the weights, not a copy"] = False
    chat_format: Annotated[str, "llama3, qwen2, mistral or plain, in place of the backbone's own template"] = ""
    name: str = ""  # the source as it was spelled when the run was begun, which adapters and answers note

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype should be one of {', '.join(DTYPES)}, not {self.dtype!r}")

    @property
    def known_as(self) -> str:
        """What adapters and answers call the backbone."""
        return self.name or self.source


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
    grows: ClassVar[tuple[str, ...]] = ()  # settings that may grow when a run is continued, see ``continued``

    def __post_init__(self) -> None:
        replace(self.training, learning_rate=self.sft_learning_rate)  # raises where it is out of range
        if self.training.seed or self.replies.sampling.seed:
            raise ValueError("a run has one seed, from which those of training and sampling are derived; set that one")

    @property
    def results(self) -> tuple[str, ...]:
        """The files of the run folder without which the run is not finished."""
        raise NotImplementedError

    def continued(self: C, stored: Mapping[str, Any]) -> C:
        """These settings, with what a run that was begun with the ``stored`` ones has to keep where others have grown.

        Raises RunError where they cannot grow so."""
        return self

    def stage(self, name: str, label: str, *, sft: bool) -> Stage:
        """A stage of training, in the folder of its name."""
        rate = self.sft_learning_rate if sft else self.training.learning_rate
        training = replace(self.training, learning_rate=rate, seed=derive_seed(self.seed, "training", name))
        return Stage(Path(self.out) / name, label, self.backbone.known_as, self.adapter, training)


class RunError(ValueError):
    """A run folder that cannot be used; the message says why and what to do."""


def load_backbone(settings: BackboneSettings) -> tuple[Transformer, ChatTokenizer]:
    """The model, on its device, and its tokenizer. Raises RunError for a device that is not there, and where the two do
    not fit together."""
    source, revision = settings.source, settings.revision or None
    tokenizer = load_tokenizer(source, revision=revision, chat_format=settings.chat_format or None)
    shared = settings.shard and ranks.size() > 1
    model = ranks.build(partial(_load, shared=True), settings) if shared else _load(settings)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise RunError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}"
        )
    model.checkpoint_activations = settings.checkpoint_activations
    return model, tokenizer


def _load(settings: BackboneSettings, *, shared: bool = False) -> Transformer:
    dtype, device = getattr(torch, dtype_of(settings)), _device(settings.device)
    return load_model(settings.source, dtype=dtype, device=device, revision=settings.revision or None, shared=shared)


def dtype_of(settings: BackboneSettings) -> str:
    """The dtype of the weights by its name, as ``auto`` takes it. Raises RunError for a device that is not there."""
    if settings.dtype != "auto":
        return settings.dtype
    return "float32" if _device(settings.device) == "cpu" else "bfloat16"


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
