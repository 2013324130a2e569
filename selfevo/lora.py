"""Low-rank adapters (LoRA) on any ``nn.Module``: inject, disable, stack, merge, and files in PEFT's format.

Notation: I and O input and output size of a linear layer, r rank of the trainable adapter, R total rank of the frozen
adapters, s = alpha / r. A layer computes ``W x + b + frozen_B frozen_A x + s lora_B lora_A x``.

The adapters of earlier iterations stay beside the weights, frozen. Folding them into bfloat16 weights would round most
of each away, and the reference model would no longer be the model that the iteration started from.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfevo.files import FileError, locate, read_object, read_tensor_shapes, replace_file, write_json
from selfevo.kernels.elementwise import all_finite
from selfevo.kernels.linear import Linear, linear
from selfevo.kernels.lowrank import adapted_linear

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Entries of PEFT's configuration that only describe the file. Any other entry that is neither read below nor switched
# off changes what the adapter computes and is refused.
_DESCRIPTIVE = {
    "layers_pattern", "inference_mode", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
    "peft_version", "megatron_core", "qalora_group_size", "eva_config",
}  # fmt: skip
# Initialisations other than these (PiSSA, OLoRA, LoftQ, ...) change the base weights.
_ALLOWED = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}
_EVERY = "all-linear"
_HEAD = ("lm_head",)
L = TypeVar("L", bound=nn.Linear)


class LoRALinear(nn.Linear):
    """A linear layer with adapters; the weight and bias are those of the layer it replaces, under the same names.

    Adapters and their products are float32 (float64 for a float64 base); the sum is rounded to the base's dtype once.
    Dropout acts only on the input of the trainable adapter, and only in training mode.
    """

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, *, generator: torch.Generator
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate and initialise a weight that is not used
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.base_type = type(base)
        self.register_parameter("bias", base.bias)
        wide = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        kind: dict[str, Any] = {"dtype": wide, "device": base.weight.device}
        self.frozen_A: Tensor = nn.Buffer(torch.empty(0, self.in_features, **kind))  # (R, I)
        self.frozen_B: Tensor = nn.Buffer(torch.empty(self.out_features, 0, **kind))  # (O, R), scaled
        self.adapter_enabled = True
        self.reset_adapter(rank, alpha, dropout, generator)
        self.train(base.training)

    def reset_adapter(self, rank: int, alpha: float, dropout: float, generator: torch.Generator) -> None:
        """Start a new trainable adapter: B zero, A random, drawn on the CPU so that it is the same on every device."""
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, not {rank!r}")
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha must be positive, not {alpha!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {dropout!r}")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        a = torch.empty(rank, self.in_features, dtype=self.frozen_A.dtype)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(a.to(self.weight.device))  # (r, I)
        self.lora_B = nn.Parameter(self.frozen_B.new_zeros(self.out_features, rank))  # (O, r)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All adapters of the layer as one with s = 1, detached: A (R + r, I) and B (O, R + r)."""
        b = self.lora_B.detach() * (self.alpha / self.rank)
        return torch.cat((self.frozen_A, self.lora_A.detach())), torch.cat((self.frozen_B, b), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if not (self.adapter_enabled or len(self.frozen_A)):
            return linear(x, self.weight, self.bias)
        # Beside frozen adapters, a disabled adapter is computed with zeros of the same shape: at the first step, policy
        # and reference then agree to the last bit.
        b = self.lora_B * (self.alpha / self.rank) if self.adapter_enabled else torch.zeros_like(self.lora_B)
        kind = "cpu" if x.is_meta else x.device.type  # autocast does not know the meta device
        if not (self.dropout or torch.is_autocast_enabled(kind)):
            return adapted_linear(x, self.weight, self.bias, self.frozen_A, self.frozen_B, self.lora_A, b)
        result = F.linear(x, self.weight, self.bias)
        with torch.autocast(kind, enabled=False):
            wide = x.to(b.dtype)
            dropped = F.dropout(wide, self.dropout, self.training)
            frozen = F.linear(F.linear(wide, self.frozen_A), self.frozen_B)
            return (result + frozen + F.linear(F.linear(dropped, self.lora_A), b)).to(result.dtype)

    def extra_repr(self) -> str:
        adapter = f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, frozen_rank={self.frozen_A.shape[0]}"
        return f"{super().extra_repr()}, {adapter}"


def _layers(model: nn.Module, kind: type[L]) -> dict[str, L]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def _adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    if not (layers := _layers(model, LoRALinear)):
        raise ValueError("the model has no adapters: call inject_lora or load_adapter first")
    return layers


def _matches(name: str, targets: Collection[str]) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def exchange(first: nn.Module, second: nn.Module) -> None:
    """Makes each of two modules what the other is, in place. Done twice, both are again as they were.

    Wherever a module is registered, and whoever knows it by its identity (as FSDP2 does the owners of the weights that
    it gathers), it stays the same object.
    """
    first.__class__, second.__class__ = second.__class__, first.__class__
    first.__dict__, second.__dict__ = second.__dict__, first.__dict__


def inject_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Collection[str] | None = None,
    *,
    seed: int = 0,
) -> list[str]:
    """Adapt every ``nn.Linear`` of the model except the output head ``lm_head``, in place, and freeze all else.

    ``targets`` selects layers by their names or the ends of these: ``["q_proj", "layers.0.mlp.up_proj"]``. The outputs
    stay the same, as B is zero; A is drawn from ``seed``, and the global generator is not used. Returns the full names
    of the adapted layers in module order. Raises ValueError, and leaves the model alone, if it has adapters already or
    no linear layer, if a target matches none or is the output head (whose weight is read directly for
    log-probabilities), for a subclass of ``nn.Linear``, whose forward may differ, and for a setting out of range.
    """
    targets = [targets] if isinstance(targets, str) else targets
    linears = _layers(model, nn.Linear)
    for target in targets or ():
        if not any(_matches(name, [target]) for name in linears):
            raise ValueError(f"target {target!r} matches no linear layer of the model")
    chosen = [name for name in linears if (not _matches(name, _HEAD) if targets is None else _matches(name, targets))]
    return _inject(model, chosen, rank, alpha, dropout, seed)


def _inject(model: nn.Module, names: list[str], rank: int, alpha: float, dropout: float, seed: int) -> list[str]:
    """Adapt exactly the layers of these names, or raise ValueError and leave the model alone."""
    if _layers(model, LoRALinear):
        raise ValueError("the model has adapters already: freeze_adapter adds one, merge_adapters folds them in")
    if not names:
        raise ValueError("there is no linear layer to adapt")
    if "" in names:
        raise ValueError("the model is itself a linear layer, without a name for its adapter: wrap it in a module")
    generator = torch.Generator().manual_seed(seed)
    adapted: dict[nn.Module, LoRALinear] = {}
    for name in names:
        base = model.get_submodule(name)
        if _matches(name, _HEAD):
            raise ValueError(f"{name} is the output head, whose weight is read directly: it cannot be adapted")
        if not isinstance(base, nn.Linear) or type(base) not in (nn.Linear, Linear):
            raise ValueError(f"{name} is a {type(base).__name__}, not a plain nn.Linear: it cannot be adapted")
        adapted[base] = LoRALinear(base, rank, alpha, dropout, generator=generator)
    for base, layer in adapted.items():
        exchange(base, layer)
    model.requires_grad_(False)
    for factor in lora_parameters(model):
        factor.requires_grad_(True)
    return names


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """A context without the trainable adapters; the frozen ones stay on. This is the reference model.

    May be nested. On leaving, also after an exception, each layer returns to its earlier state. A backward pass through
    checkpointed activations repeats the forward pass, so it must be inside too. Raises ValueError for a model without
    adapters, whose reference would be the policy itself.
    """
    before = {layer: layer.adapter_enabled for layer in _adapted_layers(model).values()}
    try:
        for layer in before:
            layer.adapter_enabled = False
        yield
    finally:
        for layer, enabled in before.items():
            layer.adapter_enabled = enabled


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable A and B of every adapted layer, in module order, without the frozen adapters."""
    return [factor for layer in _layers(model, LoRALinear).values() for factor in (layer.lora_A, layer.lora_B)]


def freeze_adapter(
    model: nn.Module,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    seed: int = 0,
) -> None:
    """Add the trainable adapter to the frozen ones and start a new one, whose B is zero.

    Settings that are not given stay the same. The new A is drawn from ``seed`` and the total rank, so it differs from
    the previous one. The parameters are new objects: create the optimiser afterwards. Raises ValueError for a model
    without adapters and for settings out of range.
    """
    layers = list(_adapted_layers(model).values())
    generator = torch.Generator().manual_seed(seed + layers[0].frozen_A.shape[0] + layers[0].rank)
    for layer in layers:
        frozen = layer.stacked()
        layer.reset_adapter(
            layer.rank if rank is None else rank,
            layer.alpha if alpha is None else alpha,
            layer.dropout if dropout is None else dropout,
            generator,
        )
        layer.frozen_A, layer.frozen_B = frozen


@torch.no_grad()
def merge_adapters(model: nn.Module) -> float:
    """Fold every adapter, frozen and trainable, into the weights, and restore plain linear layers. For export.

    The sum is computed in float32 and rounded once to the base's dtype. Returns the largest relative rounding error of
    a layer, ``norm(stored - exact) / norm(update)``: 0 in float32, near 1 if a bfloat16 weight lost the update; 0.0 for
    a model without adapters. Merged weights stay frozen and are no longer tied to other modules.
    """
    worst = 0.0
    for name in list(_layers(model, LoRALinear)):  # a list of the layers would keep all old weights in memory
        layer = cast(LoRALinear, model.get_submodule(name))
        a, b = layer.stacked()
        update = b @ a
        exact = layer.weight + update
        stored = exact.to(layer.weight.dtype)
        size = update.norm().item()
        worst = max(worst, (stored - exact).norm().item() / size if size else 0.0)
        exchange(layer, _plain(layer, nn.Parameter(stored, requires_grad=False)))
    return worst


def remove_adapters(model: nn.Module) -> None:
    """Drop every adapter, frozen and trainable; what is left is the base model, still frozen."""
    for layer in _layers(model, LoRALinear).values():
        exchange(layer, _plain(layer, layer.weight))


def _plain(layer: LoRALinear, weight: Tensor) -> nn.Linear:
    # On the meta device nothing is allocated or initialised for the weight, which is replaced at once.
    plain = layer.base_type(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight, plain.bias = weight, layer.bias
    return plain.train(layer.training)


def save_adapter(model: nn.Module, folder: str | Path, *, base_model: str = "") -> None:
    """Write all adapters as one of rank R + r in PEFT's format; ``base_model`` is the name or path of the base.

    With frozen adapters, which come first, the scales are folded into B and alpha = rank, so nothing is rounded; a
    single adapter keeps its alpha. Each file is written under a temporary name and renamed, the configuration last.
    Raises ValueError for a model without adapters, or with layers that differ in rank, alpha or dropout.
    """
    from safetensors.torch import save_file

    layers = _adapted_layers(model)
    settings = {(layer.frozen_A.shape[0], layer.rank, layer.alpha, layer.dropout) for layer in layers.values()}
    if len(settings) > 1:
        raise ValueError(f"layers differ in (frozen rank, rank, alpha, dropout): {sorted(settings)}; a file holds one")
    frozen_rank, rank, alpha, dropout = settings.pop()
    tensors = {}
    for name, layer in layers.items():
        factors = layer.stacked() if frozen_rank else (layer.lora_A.detach(), layer.lora_B.detach())
        for key, factor in zip(_keys(name), factors, strict=True):
            tensors[key] = factor.cpu().contiguous()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model or None, "bias": "none",
        "r": frozen_rank + rank, "lora_alpha": frozen_rank + rank if frozen_rank else alpha, "lora_dropout": dropout,
        "target_modules": list(layers), "inference_mode": True,
    }  # fmt: skip
    with replace_file(Path(folder) / WEIGHTS_FILE) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    write_json(Path(folder) / CONFIG_FILE, config)


def _keys(name: str) -> tuple[str, str]:
    return f"{_PREFIX}{name}.lora_A.weight", f"{_PREFIX}{name}.lora_B.weight"


@dataclass(frozen=True)
class _Config:
    """What an adapter_config.json says of plain LoRA."""

    rank: int
    alpha: float  # as if scaled by alpha / rank, also where rsLoRA scales by alpha / sqrt(rank)
    dropout: float
    targets: frozenset[str] | str | None  # ends of names of layers, or _EVERY; None where only the tensors can tell


def load_adapter(model: nn.Module, folder: str | Path) -> list[str]:
    """Adapt exactly the layers of an adapter in PEFT's format, a folder or a hub id; it becomes the trainable one.

    ``freeze_adapter`` afterwards makes it part of the reference. Returns the names of the layers. Embeddings and heads
    that the file also holds, as PEFT may write them, must be those of the model. Raises ValueError, and leaves the
    model alone, if it has adapters, for a configuration that needs more than plain LoRA with one rank (the entry is
    named), and for a tensor that is missing, unexpected, of the wrong shape or not finite.
    """
    from safetensors import safe_open

    path = locate(folder, patterns=(CONFIG_FILE, WEIGHTS_FILE)) / WEIGHTS_FILE
    config = _read_config(path.with_name(CONFIG_FILE))
    if not path.is_file() and path.with_suffix(".bin").is_file():
        raise FileError(
            f"{path.with_suffix('.bin')} is a pickle, which is not read; write it anew as safetensors: in PEFT, "
            "PeftModel.from_pretrained(base, folder).save_pretrained(folder)"
        )
    names = _check_shapes(model, read_tensor_shapes(path), config, path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    _check_numbers(model, tensors, names, path)
    try:
        _inject(model, names, config.rank, config.alpha, config.dropout, seed=0)
    except ValueError as error:
        raise FileError(f"{path}: {error}") from error
    with torch.no_grad():
        for name, layer in _layers(model, LoRALinear).items():
            for factor, key in zip((layer.lora_A, layer.lora_B), _keys(name), strict=True):
                factor.copy_(tensors[key])
    return names


def _check_shapes(model: nn.Module, stored: dict[str, tuple[int, ...]], config: _Config, path: Path) -> list[str]:
    """The layers to adapt, in module order. Raises ``FileError`` for a tensor that does not fit or is missing."""
    linears, own = _layers(model, nn.Linear), dict(model.named_parameters(remove_duplicate=False))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in linears.items():
        a_key, b_key = _keys(name)
        if a_key in stored or b_key in stored or _is_target(name, config, linears):
            shapes[a_key], shapes[b_key] = (config.rank, layer.in_features), (layer.out_features, config.rank)
    names = [name for name in linears if _keys(name)[0] in shapes]
    for key in sorted(stored.keys() - shapes.keys()):
        if (name := key.removeprefix(_PREFIX)) not in own:
            raise FileError(f"{path}: {key} belongs to no linear layer of the model")
        shapes[key] = tuple(own[name].shape)
    for key, shape in sorted(shapes.items()):
        if key not in stored:
            raise FileError(f"{path}: {key} is missing")
        if stored[key] != shape:
            raise FileError(f"{path}: {key} has shape {stored[key]}, not {shape}")
    return names


def _check_numbers(model: nn.Module, tensors: Mapping[str, Tensor], names: list[str], path: Path) -> None:
    """Raises ``FileError`` for factors that are no finite numbers, and weights that are not those of the model."""
    factors = {key for name in names for key in _keys(name)}
    own = dict(model.named_parameters(remove_duplicate=False))
    for key, tensor in tensors.items():
        if key not in factors:
            mine = own[key.removeprefix(_PREFIX)].detach().cpu()
            if not torch.equal(mine, tensor.to(mine.dtype)):
                raise FileError(f"{path}: {key} differs from the model's: it was trained too, which is more than LoRA")
        elif not tensor.is_floating_point() or tensor.element_size() < 2:
            raise FileError(f"{path}: {key} is stored as {tensor.dtype}, not as real numbers of 16 bits or more")
        elif not all_finite(tensor.float()):
            raise FileError(f"{path}: {key} holds NaN or infinite numbers; the file is damaged, or of a failed run")


def _is_target(name: str, config: _Config, linears: Collection[str]) -> bool:
    """Whether the configuration names this layer."""
    if config.targets is None or config.targets == _EVERY:
        return config.targets is not None and not _matches(name, _HEAD)
    ends = [name[dot + 1 :] for dot, char in enumerate(name) if char == "."]
    return name in config.targets or any(end in config.targets and end not in linears for end in ends)


def _read_config(path: Path) -> _Config:
    config = read_object(path)
    if (kind := config.take("peft_type", str)) != "LORA":
        raise config.fail(f"does not describe a LoRA adapter (peft_type is {reprlib.repr(kind)})")
    rank = config.take("r", int, low=1)
    # An alpha or a dropout beyond these leaves nothing of the adapter or of the model.
    alpha = config.take("lora_alpha", float, low=1e-6, high=1e6)
    dropout = config.take("lora_dropout", float, 0.0, low=0, high=0.999)
    if config.take("use_rslora", bool, False):
        alpha *= math.sqrt(rank)
    targets = config.values.get("target_modules")
    if not isinstance(targets, str):
        targets = frozenset(config.take_list("target_modules", str, ()))
    # A regular expression is not matched, as it may take for ever: the tensors decide, as they do for exceptions.
    narrowed = config.values.get("exclude_modules") or config.values.get("layers_to_transform") is not None
    if narrowed or not targets or (isinstance(targets, str) and targets != _EVERY):
        targets = None
    read = config.taken | _DESCRIPTIVE | {"target_modules", "exclude_modules", "layers_to_transform"}
    for key, value in config.values.items():
        if value not in _ALLOWED[key] if key in _ALLOWED else value and key not in read:
            raise config.fail(f"{key} = {reprlib.repr(value)} is not supported")
    return _Config(rank, alpha, dropout, targets)
