"""The output head: log-probabilities of targets in chunks, and logits for sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfevo.kernels.linear import linear

# The machine constants of this and other files are listed, with what they were measured on, in docs/performance.md.
# Logits held at once by linear_logps: some hundreds of rows, so that reading the head is not the bottleneck.
_CPU_CHUNK_BYTES = 192 * 2**20
GPU_CHUNK_BYTES = 256 * 2**20
# The softmax takes several passes over the logits: on a CPU over as many rows at a time as its cache holds.
_CPU_BLOCK_BYTES = 4 * 2**20


def check_targets(targets: Tensor, vocab_size: int) -> None:
    """Raises ValueError for token ids outside the vocabulary; on a GPU the gather fails instead."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"token ids must be integers, not {targets.dtype}")
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"token ids must be in [0, {vocab_size}), found {low if low < 0 else high}")


def linear_logps(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """Log-probability of each target under a bias-free output head: (N, D), (V, D), (N,) -> (N,) float32.

    Equals ``log_softmax((hidden @ weight.T).float())`` at the targets, but works through ``chunk_size`` rows at a time
    (by default as many as fit a byte budget) and never holds (N, V). With a frozen head nothing is computed twice: the
    gradient of each row is found along with its value, and the backward pass only scales it. A trainable head has its
    logits recomputed in the backward pass. Differentiable once.

    Raises ValueError for mismatched shapes, dtypes or devices and for targets outside the vocabulary; the last
    is checked on a CPU only, on a GPU it is a failed device assertion.
    """
    fits = hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    if not fits or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"expected hidden (rows, size), weight (vocab, size) and targets (rows,), not {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must share one floating dtype, not {hidden.dtype} and {weight.dtype}")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(f"hidden, weight and targets are on {hidden.device}, {weight.device} and {targets.device}")
    check_targets(targets, weight.shape[0])
    if chunk_size is None:
        budget = _CPU_CHUNK_BYTES if hidden.device.type == "cpu" else GPU_CHUNK_BYTES
        most = max(1, budget // (weight.element_size() * max(1, weight.shape[0])))
        chunks = max(1, math.ceil(len(hidden) / most))
        chunk_size = max(1, math.ceil(len(hidden) / chunks))  # equal ones: a small rest is slow
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    if not torch.is_grad_enabled():  # a Function knows what requires grad, but not that gradients are off
        hidden, weight = hidden.detach(), weight.detach()
    logps: Tensor = _LinearLogps.apply(hidden, weight, targets.long(), chunk_size)
    return logps


class _Softmax(NamedTuple):
    """Of b rows of a chunk: e^(logit - max) in float32 or float64, their sums, and the targets' log-probabilities."""

    rows: slice  # within the chunk
    exponentials: Tensor  # (b, V), a buffer to be overwritten
    sums: Tensor  # (b, 1)
    logps: Tensor  # (b, 1)


class _ChunkBuffers:
    """Buffers for the logits of one chunk in the head's dtype, and for a block of its rows in float32."""

    def __init__(self, hidden: Tensor, weight: Tensor, chunk_size: int, block_size: int | None = None) -> None:
        rows, vocab = min(chunk_size, hidden.shape[0]), weight.shape[0]
        wide_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        if block_size is None:
            block_size = max(1, _CPU_BLOCK_BYTES // (4 * vocab)) if hidden.device.type == "cpu" else rows
        self.block_size = block_size
        self.narrow = hidden.new_empty(rows, vocab)
        same = hidden.dtype == wide_dtype
        self.wide = self.narrow if same else hidden.new_empty(min(block_size, rows), vocab, dtype=wide_dtype)

    def softmax(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Iterator[_Softmax]:
        """(C, D), (V, D), (C, 1) -> blocks, whose rows of ``narrow`` may be overwritten as well."""
        torch.mm(hidden, weight.t(), out=self.narrow[: hidden.shape[0]])
        for start in range(0, hidden.shape[0], self.block_size):
            rows = slice(start, min(start + self.block_size, hidden.shape[0]))
            wide = self.narrow[rows]
            if self.wide.dtype != self.narrow.dtype:
                wide = self.wide[: rows.stop - rows.start].copy_(wide)
            wide.sub_(wide.amax(dim=1, keepdim=True))
            target_logits = wide.gather(1, targets[rows])
            sums = wide.exp_().sum(dim=1, keepdim=True)
            yield _Softmax(rows, wide, sums, target_logits - sums.log())


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
        ctx.chunk_size = chunk_size
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        buffers = _ChunkBuffers(hidden, weight, chunk_size)
        logps = buffers.wide.new_empty(hidden.shape[0])
        slopes = torch.empty_like(hidden) if needs_hidden else None  # d logp / d hidden of each row
        for start in range(0, hidden.shape[0], chunk_size):
            chunk = slice(start, start + chunk_size)
            columns = targets[chunk, None]
            for rows, exponentials, sums, block_logps in buffers.softmax(hidden[chunk], weight, columns):
                logps[chunk][rows] = block_logps[:, 0]
                if slopes is not None:
                    residuals = buffers.narrow[rows]  # onehot - softmax, rounded once to the head's dtype
                    torch.div(exponentials, sums.neg_(), out=residuals)
                    # 1 - p of the target comes from float32: rounded to bfloat16 first, p would be 1 from 0.998 on.
                    residuals.scatter_(1, columns[rows], block_logps.expm1().neg_().to(residuals.dtype))
            if slopes is not None:
                torch.mm(buffers.narrow[: len(columns)], weight, out=slopes[chunk])
        ctx.save_for_backward(slopes, *((hidden, weight, targets) if needs_weight else ()))
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        slopes, *inputs = ctx.saved_tensors
        grad_hidden = None if slopes is None else (slopes * grad[:, None]).to(slopes.dtype)
        grad_weight = _weight_gradient(grad, *inputs, chunk_size=ctx.chunk_size) if inputs else None
        return grad_hidden, grad_weight, None, None


def _weight_gradient(grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_size: int) -> Tensor:
    """Sum over rows of grad * (onehot - softmax) hidden^T: (V, D), accumulated in float32 over recomputed chunks."""
    buffers = _ChunkBuffers(hidden, weight, chunk_size, block_size=chunk_size)
    total = torch.zeros_like(weight, dtype=buffers.wide.dtype)
    for start in range(0, hidden.shape[0], chunk_size):
        chunk = slice(start, start + chunk_size)
        columns, scales = targets[chunk, None], grad[chunk, None]
        for _, residuals, sums, logps in buffers.softmax(hidden[chunk], weight, columns):
            residuals.mul_(-scales / sums).scatter_(1, columns, -scales * logps.expm1())
            total.addmm_(residuals.t(), hidden[chunk].to(total.dtype))
    return total.to(weight.dtype)


_COLUMNS = 16  # on a CPU, columns of float32 logits are padded to a multiple of this
_FEW = 4  # rows; with fewer, a product is no faster with the weights on the left


def allocate_logits(rows: int, weight: Tensor) -> Tensor:
    """The buffer that :func:`head_logits` writes into, for up to so many rows."""
    return weight.new_empty(len(weight) * math.ceil(rows / _COLUMNS) * _COLUMNS)


def head_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Hidden states (R, D), head (V, D) -> logits (V, R or more) of their dtype, written into a prefix of ``out``, a
    buffer of :func:`allocate_logits`.

    With the head as the left factor the product is faster. On a CPU, many float32 rows are padded to a multiple of 16:
    columns from the R-th on are padding and mean nothing.
    """
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32 and len(hidden) > 3 * _COLUMNS:
        hidden = F.pad(hidden, (0, 0, 0, -len(hidden) % _COLUMNS))
    logits = out[: len(weight) * len(hidden)].view(len(weight), -1)
    if hidden.device.type == "cpu" and len(hidden) < _FEW:
        return logits.copy_(linear(hidden, weight).t())
    return torch.mm(weight, hidden.t(), out=logits)
