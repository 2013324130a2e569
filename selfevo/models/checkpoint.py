"""Checkpoints in Hugging Face layout: loading, which checks that every tensor is there and fits, and saving."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfevo.files import (
    Fields,
    FileError,
    locate,
    read_json,
    read_object,
    read_tensor_shapes,
    replace_file,
    write_json,
    write_text,
)
from selfevo.kernels.elementwise import all_finite
from selfevo.models import llama, mistral, qwen2
from selfevo.models.hf_config import ConfigError, ConfigReader
from selfevo.models.model_config import ModelConfig
from selfevo.models.sharded import in_place_of, own_rows, share_out
from selfevo.models.tokenizer import FILES as TOKENIZER_FILES
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.models.transformer import Transformer

FAMILIES = {"llama": llama, "mistral": mistral, "qwen2": qwen2}  # by model_type
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Older files store these; they follow from config.json.
_GENERATION_TOKENS = ("bos_token", "eos_token", "pad_token")
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class CheckpointError(FileError):
    """A checkpoint that cannot be loaded or written; the message names the file or tensor and what is wrong."""


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    allow_unknown: Collection[str] = (),
    shared: bool = False,
) -> Transformer:
    """Loads a Llama, Qwen2 or Mistral checkpoint from a folder in Hugging Face layout or a hub id.

    ``dtype`` None keeps the stored one, that of the first tensor where there are several. ``allow_unknown`` names keys
    of config.json that are left out though this library does not know them. Tensors are read one at a time, so the peak
    host memory is the weights in the target dtype plus one tensor. With ``shared``, the processes of torch.distributed,
    all of which make this call, divide the weights of the blocks, which are then frozen, and each reads its own part
    (see ``sharded.py``).

    Raises :class:`CheckpointError`, with the name of the file or tensor, for a truncated file and a missing, extra or
    mis-shaped tensor, and ``ConfigError``, with the key, for a configuration that is not implemented. Both are
    ValueErrors.
    """
    # Some repositories hold the weights twice, the second time as consolidated.safetensors.
    folder = locate(source, patterns=("config.json", "model*.safetensors", INDEX), revision=revision)
    config = read_config(folder, allow_unknown)
    shards = _shards(folder)
    if config.tied and _has_own_head(shards):
        warnings.warn(
            f"{folder}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; loaded as stored, untied",
            stacklevel=2,
        )
        config = replace(config, tied=False)
    stored = sum(map(len, shards.values()))
    if config.num_layers > stored:  # before they are built
        raise CheckpointError(f"{folder}: config.json has {config.num_layers} layers, its weights {stored} tensors")
    with torch.device("meta"):
        model = Transformer(config)
    if shared:
        share_out(model, torch.device(device).type)
    expected = model.state_dict()
    loaded: dict[str, Tensor] = {}
    for shard, names in shards.items():
        for name in names:
            if _DERIVED.fullmatch(name):
                continue
            if name not in expected:
                raise CheckpointError(f"{shard}: the tensor {name} has no place in a {config.family} model")
            loaded[name] = _read_tensor(shard, name, expected[name], dtype, torch.device(device))
            dtype = dtype or loaded[name].dtype
    if config.tied:  # the shared tensor may be stored under either name or under both
        either = [loaded[name] for name in (EMBEDDING, HEAD) if name in loaded]
        if either:
            loaded[EMBEDDING] = loaded[HEAD] = either[0]
    missing = sorted(expected.keys() - loaded.keys())
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    model.load_state_dict(loaded, assign=True)
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def _has_own_head(shards: Mapping[Path, Sequence[str]]) -> bool:
    """Whether the output head is stored and differs from the embedding."""
    places = {name: shard for shard, names in shards.items() for name in names if name in (EMBEDDING, HEAD)}
    if len(places) < 2:
        return False
    return not torch.equal(*(_stored(places[name], name) for name in (EMBEDDING, HEAD)))


def read_config(folder: Path, allow_unknown: Collection[str] = ()) -> ModelConfig:
    """The configuration of the checkpoint in ``folder``, without the keys ``allow_unknown``."""
    path = folder / "config.json"
    reader = ConfigReader(read_json(path), str(path), allow_unknown)
    kind = reader.take("model_type", str)
    if kind not in FAMILIES:
        raise reader.fail(f"the model_type {kind[:80]!r} is not implemented; {', '.join(FAMILIES)} are")
    for architecture in reader.take_list("architectures", str, ()):
        if not architecture.endswith("ForCausalLM"):
            raise reader.fail(f"{architecture[:80]!r} is not a causal language model")
    try:
        config: ModelConfig = FAMILIES[kind].read_config(reader)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    reader.finish()
    return config


def _shards(folder: Path) -> dict[Path, list[str]]:
    """The weight files and the names of the tensors in each."""
    single, index = folder / WEIGHTS, folder / INDEX
    if os.path.lexists(single):
        return {single: _stored_names(folder, single)}
    if not os.path.lexists(index):
        raise CheckpointError(f"{folder}: has neither {WEIGHTS} nor {INDEX} (other weight formats are not read)")
    weight_map = Fields(read_object(index).take("weight_map", dict), f"{index}, weight_map")
    shards: dict[Path, list[str]] = {}
    for name in weight_map.values:
        file = weight_map.take(name, str)
        if Path(file).is_absolute() or ".." in Path(file).parts or not file.endswith(".safetensors"):
            raise weight_map.fail(f"{name[:80]!r} is said to be in {file[:80]!r}, which is no shard in the same folder")
        shards.setdefault(folder / file, []).append(name)
    for shard, names in shards.items():
        if not os.path.isfile(shard):
            raise CheckpointError(f"{index}: the shard {shard.name} is not there; it holds {names[0]} and others")
    for shard, names in shards.items():
        stored = _stored_names(folder, shard)
        for name in sorted({*stored} ^ {*names}):
            where = "is in the index but not in the file" if name not in stored else "is not in the index"
            raise CheckpointError(f"{shard}: the tensor {name} {where}")
    return shards


def _stored_names(folder: Path, path: Path) -> list[str]:
    """The tensors in a file of ``folder``, which may be a link to one of the hub's cache."""
    folder, place = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    cache = folder.parents[1:3] if folder.parent.name == "snapshots" else ()
    if not any(place.is_relative_to(root) for root in (folder, *(above / "blobs" for above in cache))):
        raise CheckpointError(f"{path}: is a link to {place}, outside of its folder; put a copy in its place")
    try:
        return sorted(read_tensor_shapes(path))
    except FileError as error:
        raise CheckpointError(str(error)) from error


def _stored(path: Path, name: str, place: Tensor | None = None) -> Tensor:
    """A tensor in a file, or what this rank keeps of one whose ``place`` in the model, without values, is given."""
    try:
        with safe_open(path, framework="pt") as file:
            if place is None:
                whole: Tensor = file.get_tensor(name)
                return whole
            stored = file.get_slice(name)
            if (shape := tuple(stored.get_shape())) == place.shape:
                rows: Tensor = stored[own_rows(place)]
                return rows
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {name} cannot be read ({error}); the file is damaged") from error
    raise CheckpointError(f"{path}: {name} has shape {shape}, but the configuration needs {tuple(place.shape)}")


def _read_tensor(path: Path, name: str, place: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """What this rank keeps of a tensor, copied out of the file, which is closed at once: its mapped pages would count
    as memory in use."""
    tensor = _stored(path, name, place)
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise CheckpointError(f"{path}: {name} is stored as {tensor.dtype}; quantised weights are not implemented")
    tensor = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
    if not all_finite(tensor):
        raise CheckpointError(f"{path}: {name} holds NaN or infinite numbers; the file is damaged, or of a failed run")
    return in_place_of(place, tensor)


def save_pretrained(model: Transformer, tokenizer: ChatTokenizer | None, folder: str | Path) -> None:
    """Writes config.json, safetensors weights (in shards of 5 GB), the tokenizer's files, a chat template that writes
    the tokenizer's format and generation_config.json, for transformers to read; weights that were there are removed.

    Adapters must be merged (``selfevo.lora.merge_adapters``) or saved apart (``save_adapter``) first: raises
    :class:`CheckpointError` for a model that has some, and for a tokenizer with more ids than the model.
    """
    from huggingface_hub import split_torch_state_dict_into_shards  # slow to import

    folder = Path(folder)
    if tokenizer is not None and tokenizer.vocab_size > (size := model.config.vocab_size):
        raise CheckpointError(
            f"{folder}: not written, as the tokenizer has {tokenizer.vocab_size} ids, the model {size}"
        )
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        plain = Transformer(model.config).state_dict()
    for name in state:
        if name not in plain:
            raise CheckpointError(f"{name} belongs to an adapter: merge it into the weights first, or save it apart")
    if model.config.tied:
        del state[HEAD]
    split = split_torch_state_dict_into_shards(state, max_shard_size="5GB")
    for stale in [folder / INDEX, *folder.glob("model*.safetensors"), *folder.glob("pytorch_model*")]:
        if stale.name not in split.filename_to_tensors:
            stale.unlink(missing_ok=True)
    for file, names in split.filename_to_tensors.items():
        with replace_file(folder / file) as partial:
            save_file({name: state[name] for name in names}, partial, metadata={"format": "pt"})
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    values: dict[str, Any] = FAMILIES[model.config.family].write_config(model.config)
    values["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    if tokenizer is not None:
        named = {f"{name}_id": id_ for name, id_ in tokenizer.named_ids.items() if name in _GENERATION_TOKENS}
        values |= named | {"eos_token_id": list(tokenizer.stop_ids)}
        source = tokenizer.folder
        if source is not None and source.resolve() != folder.resolve():
            for name in TOKENIZER_FILES:
                if (source / name).is_file():
                    with replace_file(folder / name) as partial:
                        shutil.copyfile(source / name, partial)
        if tokenizer.chat_template:
            write_text(folder / "chat_template.jinja", tokenizer.chat_template)
        generation = folder / "generation_config.json"
        settings = read_object(generation).values if generation.is_file() else {}
        write_json(generation, settings | named | {"eos_token_id": list(tokenizer.stop_ids)})
    write_json(folder / "config.json", values)
