"""Weights that the ranks share: each keeps some rows of every matrix of a block, and a block's are gathered while it is
computed (FSDP2). Embedding, final norm, head and adapters are whole on every rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from selfevo.kernels.mirror import is_shared_out
from selfevo.models.transformer import Transformer


def share_out(model: Transformer, device: str) -> None:
    """Shares the weights of a model that is still on the meta device out among all ranks; they are then frozen.

    Raises ValueError for a version of PyTorch that cannot.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        raise ValueError(f"sharing weights out needs PyTorch 2.7 or later, this is {torch.__version__}")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model.requires_grad_(False)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    whole = {parameter for parameter in model.parameters() if not is_shared_out(parameter)}
    fully_shard(model, mesh=mesh, ignored_params=whole)  # of the blocks it makes one model, which gathers ahead
    register_fsdp_forward_method(model, "_pass")
    model.shared = True


def own_rows(tensor: Tensor) -> slice:
    """The rows of a tensor that this rank keeps."""
    if not is_shared_out(tensor):
        return slice(0, len(tensor))
    size = -(-len(tensor) // dist.get_world_size())
    start = min(dist.get_rank() * size, len(tensor))
    return slice(start, min(start + size, len(tensor)))


def in_place_of(tensor: Tensor, rows: Tensor) -> Tensor:
    """This rank's rows as what stands for the whole tensor."""
    if not is_shared_out(tensor):
        return rows
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return DTensor.from_local(
        rows, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def own_part(tensor: Tensor) -> tuple[int, Tensor]:
    """What this rank keeps of the flattened tensor, and where in it that begins."""
    if not is_shared_out(tensor):
        return 0, tensor.flatten()
    local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return own_rows(tensor).start * (tensor.numel() // max(1, len(tensor))), local.flatten()
