"""Mirrors: copies of rank 0's models on the other ranks, of which only what has changed is sent."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_BUCKET = 2**26  # bytes of small tensors that are sent as one
Send = Callable[[Tensor], None]  # broadcasts a tensor of bytes from rank 0, in place on the others


@dataclass(frozen=True)
class Changes:
    """What the mirror of a model needs: its modules where they changed (without the tensors' values), and the tensors
    that follow, each with all its names."""

    modules: nn.Module | None
    tensors: list[tuple[tuple[str, ...], torch.Size, torch.dtype, str]]


@dataclass
class Original:
    """What the mirrors of a model know of it."""

    outline: Any = None
    sent: dict[str, tuple[weakref.ref[Tensor], int]] = field(default_factory=dict)

    def changes(self, model: nn.Module) -> tuple[Changes, list[Tensor]]:
        """What has changed since the last call, and the tensors to send."""
        outline, named = _outline(model), _tensors(model)
        modules = _without_values(model) if outline != self.outline else None
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
    wanted = changes.modules.state_dict().keys()
    changes.modules.load_state_dict({name: known[name] for name in wanted}, assign=True)
    return changes.modules, fresh


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
    """The tensors of a model, each with all its names."""
    names: dict[int, list[str]] = {}
    found: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        found[id(tensor)] = tensor
    return [(tuple(names[key]), tensor) for key, tensor in found.items()]


def _outline(model: nn.Module) -> Any:
    """What makes a model another one, but for the values of its tensors: modules with their plain settings, shapes."""
    modules = [
        (name, type(module), [(key, value) for key, value in vars(module).items() if isinstance(value, (int, float))])
        for name, module in model.named_modules()
    ]
    tensors = [
        (name, value.shape, value.dtype, value.requires_grad)
        for name, value in model.state_dict(keep_vars=True).items()
    ]
    return modules, tensors


def _without_values(model: nn.Module) -> nn.Module:
    """A copy whose tensors are on the meta device."""
    memo: dict[int, Any] = {}
    for _, tensor in _tensors(model):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)
