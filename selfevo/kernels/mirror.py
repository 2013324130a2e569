"""Mirrors: copies of rank 0's models on the other ranks, of which only what has changed is sent.

Weights that the ranks share out (DTensors) are never sent: each rank has loaded its part of them.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_BUCKET = 2**26  # bytes of small tensors that are sent as one
Send = Callable[[Tensor], None]  # broadcasts a tensor of bytes from rank 0, in place on the others


def is_shared_out(tensor: Tensor | None) -> bool:
    """Whether a tensor is a DTensor, of which each rank has a part; where nobody has imported them, which takes most
    of a second, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@dataclass(frozen=True)
class Skeleton:
    """One of the modules of a model whose weights are shared out, which FSDP2 allows no copies of: its class where it
    has no submodules (FSDP2 gives those that have some another), its settings, and its own tensors on the meta device,
    but for those that are shared out."""

    kind: type[nn.Module] | None
    settings: dict[str, Any]
    parameters: dict[str, Tensor | None]
    buffers: dict[str, Tensor | None]

    @classmethod
    def of(cls, module: nn.Module) -> Skeleton:
        if module._modules:
            return cls(None, _settings(module), {}, {})
        settings = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        parameters, buffers = (
            {key: _without_value(value) for key, value in tensors.items() if not is_shared_out(value)}
            for tensors in (module._parameters, module._buffers)
        )
        return cls(type(module), settings, parameters, buffers)

    def put_into(self, module: nn.Module) -> None:
        vars(module).update(self.settings)
        if self.kind is not None:
            module.__class__ = self.kind
            shared = {key: value for key, value in module._parameters.items() if is_shared_out(value)}
            vars(module).update(_parameters=shared | self.parameters, _buffers=dict(self.buffers))


@dataclass(frozen=True)
class Changes:
    """What the mirror of a model needs: its modules where they changed (without the tensors' values), and the tensors
    that follow, each with all its names."""

    modules: nn.Module | dict[str, Skeleton] | None
    tensors: list[tuple[tuple[str, ...], torch.Size, torch.dtype, str]]


@dataclass
class Original:
    """What the mirrors of a model know of it."""

    outline: Any = None
    sent: dict[str, tuple[weakref.ref[Tensor], int]] = field(default_factory=dict)

    def changes(self, model: nn.Module) -> tuple[Changes, list[Tensor]]:
        """What has changed since the last call, and the tensors to send."""
        outline, named = _outline(model), _tensors(model)
        modules: nn.Module | dict[str, Skeleton] | None = None
        if outline != self.outline and any(is_shared_out(tensor) for tensor in model.parameters()):
            modules = {name: Skeleton.of(module) for name, module in model.named_modules()}
        elif outline != self.outline:
            modules = _without_values(model)
        changed = [(names, tensor) for names, tensor in named if not self._knows(names[0], tensor)]
        self.outline = outline
        self.sent = {names[0]: (weakref.ref(tensor), tensor._version) for names, tensor in named}
        told = [(names, tensor.shape, tensor.dtype, tensor.device.type) for names, tensor in changed]
        return Changes(modules, told), [tensor for _, tensor in changed]

    def _knows(self, name: str, tensor: Tensor) -> bool:
        known = self.sent.get(name)
        return known is not None and known[0]() is tensor and known[1] == tensor._version


def follow(
    mirror: nn.Module | None, changes: Changes, device: Callable[[str], torch.device]
) -> tuple[nn.Module, list[Tensor]]:
    """The mirror with these changes made, and its tensors whose values follow; ``device`` says where one of a kind
    lies on this rank."""
    known = {} if mirror is None else mirror.state_dict(keep_vars=True)
    if changes.modules is None and mirror is not None:
        return mirror, [known[names[0]] for names, *_ in changes.tensors]
    assert changes.modules is not None
    fresh = []
    for names, shape, dtype, kind in changes.tensors:
        fresh.append(torch.empty(shape, dtype=dtype, device=device(kind)))
        known |= dict.fromkeys(names, fresh[-1])
    if isinstance(changes.modules, nn.Module):
        mirror = changes.modules
    else:
        assert mirror is not None  # built by this rank
        for name, skeleton in changes.modules.items():
            skeleton.put_into(mirror.get_submodule(name))
    mirror.load_state_dict({name: known[name] for name in mirror.state_dict()}, assign=True)
    return mirror, fresh


@torch.no_grad()
def transfer(tensors: list[Tensor], send: Send, *, first: bool) -> None:
    """Sends the values of rank 0's tensors (``first``) to the others', of the same shapes; small ones together."""
    for bucket in _buckets(tensors):
        parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in bucket]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        send(whole)
        if not first and len(parts) > 1:
            for part, values in zip(parts, whole.split([len(part) for part in parts])):
                part.copy_(values)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        own = tensor.numel() * tensor.element_size()
        if not own:
            continue
        if bucket and (size + own > _BUCKET or tensor.device != bucket[0].device):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += own
    if bucket:
        yield bucket


def _tensors(model: nn.Module) -> list[tuple[tuple[str, ...], Tensor]]:
    """The tensors of a model that are not shared out, each with all its names."""
    names: dict[int, list[str]] = {}
    found: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if is_shared_out(tensor):
            continue
        names.setdefault(id(tensor), []).append(name)
        found[id(tensor)] = tensor
    return [(tuple(names[key]), tensor) for key, tensor in found.items()]


def _outline(model: nn.Module) -> Any:
    """What makes a model another one, but for the values of its tensors: modules with their plain settings, shapes."""
    modules = [(name, type(module), _settings(module)) for name, module in model.named_modules()]
    tensors = [
        (name, value.shape, value.dtype, value.requires_grad)
        for name, value in model.state_dict(keep_vars=True).items()
    ]
    return modules, tensors


def _settings(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if isinstance(value, (int, float))}


def _without_values(model: nn.Module) -> nn.Module:
    """A copy whose tensors are on the meta device."""
    memo: dict[int, Any] = {id(tensor): _without_value(tensor) for _, tensor in _tensors(model)}
    return copy.deepcopy(model, memo)


def _without_value(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
