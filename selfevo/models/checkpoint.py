"""Checkpoints in Hugging Face layout: loading with every tensor accounted for, and saving."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from selfevo.files import read_json, replace_file, write_json
from selfevo.models import llama, mistral, qwen2
from selfevo.models.hf_config import ConfigError, ConfigReader
from selfevo.models.hub import CheckpointError, locate
from selfevo.models.model_config import ModelConfig
from selfevo.models.tokenizer import FILES as TOKENIZER_FILES
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.models.transformer import Transformer


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` is read and written."""

    read_config: Callable[[ConfigReader], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]


FAMILIES = {
    "llama": Family(llama.read_config, llama.write_config),
    "mistral": Family(mistral.read_config, mistral.write_config),
    "qwen2": Family(qwen2.read_config, qwen2.write_config),
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # older files store what config.json says
_SHARD_BYTES = 5 * 10**9


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> Transformer:
    """Loads a Llama, Qwen2 or Mistral checkpoint from a folder in Hugging Face layout or a hub id.

    ``dtype`` None keeps the stored one. Tensors are read one at a time, so the peak host memory is the weights in the
    target dtype plus one tensor. Raises :class:`CheckpointError` (missing, extra, mis-shaped or truncated tensors,
    by name) or ``ConfigError`` (a configuration feature that is not implemented, by name); both are ValueErrors.
    """
    folder = locate(source, patterns=("config.json", "*.safetensors", INDEX), revision=revision)
    config = read_config(folder)
    shards = _shards(folder)
    with torch.device("meta"):
        model = Transformer(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    expected.setdefault(HEAD, model.lm_head.weight.shape)
    loaded: dict[str, Tensor] = {}
    for shard, names in shards.items():
        _check_whole(shard)
        for name in names:
            if _DERIVED.fullmatch(name):
                continue
            if name not in expected:
                raise CheckpointError(f"{shard}: the tensor {name} has no place in a {config.family} model")
            loaded[name] = _read_tensor(shard, name, expected[name], dtype, torch.device(device))
    _settle_tied_head(folder, config, loaded)
    missing = sorted(expected.keys() - loaded.keys())
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    for name, tensor in loaded.items():
        _assign(model, name, tensor)
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def read_config(folder: Path) -> ModelConfig:
    """The configuration of the checkpoint in ``folder``."""
    path = folder / "config.json"
    values = read_json(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: should hold a JSON object, not a {type(values).__name__}")
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(f"{path}: the model_type {kind!r} is not implemented; {', '.join(FAMILIES)} are")
    for architecture in values.get("architectures") or []:
        if not str(architecture).endswith("ForCausalLM"):
            raise ConfigError(f"{path}: {architecture} is not a causal language model")
    reader = ConfigReader(values, str(path))
    try:
        config = FAMILIES[kind].read_config(reader)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    reader.finish()
    return config


def _shards(folder: Path) -> dict[Path, list[str]]:
    """The weight files and the tensor names to take from each."""
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: sorted(_header(folder / WEIGHTS))}
    index = folder / INDEX
    if not index.is_file():
        raise CheckpointError(f"{folder}: neither {WEIGHTS} nor {INDEX} is there (other weight formats are not read)")
    try:
        weight_map = dict(read_json(index)["weight_map"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: not an index with a weight_map: {error}") from error
    shards: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        shards.setdefault(folder / file, []).append(name)
    for shard, names in shards.items():
        if not shard.is_file():
            raise CheckpointError(f"{index}: the shard {shard.name} is not there; it holds {names[0]} and others")
        stored = set(_header(shard))
        for name in sorted(stored.symmetric_difference(names)):
            where = "is in the index but not in the file" if name not in stored else "is not in the index"
            raise CheckpointError(f"{shard}: the tensor {name} {where}")
    return shards


def _header(path: Path) -> dict[str, Any]:
    """The table of contents of a safetensors file: its first 8 bytes give the length of the JSON that follows."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise CheckpointError(
                f"{path}: truncated or not a safetensors file: its header does not fit into {size} bytes"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    return {name: {**entry, "end": 8 + length + entry["data_offsets"][1]} for name, entry in header.items()}


def _check_whole(path: Path) -> None:
    """Names the first tensor that a truncated file no longer holds in full."""
    size = path.stat().st_size
    for name, entry in sorted(_header(path).items(), key=lambda item: item[1]["end"]):
        if entry["end"] > size:
            raise CheckpointError(
                f"{path}: truncated: {name} should end at byte {entry['end']:,}, but the file has {size:,}"
            )


def _read_tensor(path: Path, name: str, shape: torch.Size, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """One tensor, copied out of the file; the mapping is closed at once, so its pages do not add up."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            if tensor.shape != shape:
                stored, wanted = tuple(tensor.shape), tuple(shape)
                raise CheckpointError(f"{path}: {name} has shape {stored}, the configuration asks for {wanted}")
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise CheckpointError(
                    f"{path}: {name} is stored as {tensor.dtype}; quantised weights are not implemented"
                )
            return tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error


def _settle_tied_head(folder: Path, config: ModelConfig, loaded: dict[str, Tensor]) -> None:
    """A shared embedding may be stored under either name or both; two that differ are not shared."""
    if not config.tied:
        return
    stored = [loaded[name] for name in (EMBEDDING, HEAD) if name in loaded]
    if len(stored) == 2 and not torch.equal(*stored):
        raise CheckpointError(f"{folder}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}")
    if stored:
        loaded[EMBEDDING] = loaded[HEAD] = stored[0]


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor))


def save_pretrained(model: Transformer, tokenizer: ChatTokenizer | None, folder: str | Path) -> None:
    """Writes config.json, safetensors weights (sharded above 5 GB) and the tokenizer's files, for transformers to read.

    Adapters must have been merged (``selfevo.lora.merge_adapters``) or saved apart (``save_adapter``).
    """
    folder = Path(folder)
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tied:
        del state[HEAD]
    with torch.device("meta"):
        plain = Transformer(model.config).state_dict().keys()
    for name in state:
        if name not in plain:
            raise CheckpointError(f"{name} belongs to an adapter: merge it into the weights first, or save it apart")
    shards = list(_split(state))
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with replace_file(folder / name) as partial:
            save_file(shard, partial, metadata={"format": "pt"})
    if len(shards) > 1:
        count = len(shards)
        weight_map = {k: f"model-{n:05d}-of-{count:05d}.safetensors" for n, part in enumerate(shards, 1) for k in part}
        total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    values = FAMILIES[model.config.family].write_config(model.config)
    values["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    if tokenizer is not None:
        values["eos_token_id"] = list(tokenizer.stop_ids)
        source = tokenizer.folder
        if source is not None and source.resolve() != folder.resolve():
            for name in TOKENIZER_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
    write_json(folder / "config.json", values)


def _split(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    left = _SHARD_BYTES
    for name, tensor in state.items():
        size = math.prod(tensor.shape) * tensor.element_size()
        if shard and size > left:
            yield shard
            shard, left = {}, _SHARD_BYTES
        shard[name] = tensor
        left -= size
    yield shard
