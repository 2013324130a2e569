"""Log-probabilities under the frozen reference, stored with a fingerprint of what they were computed from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selfevo.files import read_object, write_json
from selfevo.kernels import ranks
from selfevo.kernels.mirror import is_shared_out
from selfevo.lora import disable_adapters
from selfevo.models.sharded import own_part
from selfevo.models.transformer import Transformer
from selfevo.scoring import packed_logps
from selfevo.training.objectives import PairIds, both_sides
from selfevo.trie.packing import pack
from selfevo.trie.trie import as_ids


def reference_logps(model: Transformer, pairs: Sequence[PairIds], max_tokens: int) -> Tensor:
    """Log-probabilities of chosen and rejected replies under the frozen reference, the model with its trainable
    adapter disabled: (N, 2) float32 on the CPU. Packs of pairs are dealt to the ranks."""
    items = [[as_ids([*pair.prompt, *pair.chosen]), as_ids([*pair.prompt, *pair.rejected])] for pair in pairs]
    packs = pack(items, max_tokens)
    shares = ranks.share_out([sum(len(own) for i in members for own in items[i]) for members in packs])
    parts = [[[pairs[i] for i in packs[number]] for number in share] for share in shares]
    result = torch.empty(len(pairs), 2)
    result[[i for share in shares for number in share for i in packs[number]]] = torch.cat(
        ranks.deal(_reference_part, model, parts)
    )
    return result


@torch.no_grad()
def _reference_part(model: Transformer, packs: list[list[PairIds]]) -> Tensor:
    with disable_adapters(model):
        found = [packed_logps(model, both_sides(pairs))[0].view(2, -1).T for pairs in packs]
        model.keep_pace()
    return torch.cat(found).cpu() if found else torch.empty(0, 2)


def fingerprint(model: Transformer, pairs: Sequence[PairIds]) -> str:
    """Identifies the reference model and the pairs that log-probabilities were computed with.

    Large weights are sampled at a stride; the frozen adapters of earlier iterations, which are what changes between
    iterations, are taken whole.
    """
    digest = hashlib.sha256(repr(model.config).encode())
    by_rank = ranks.deal(_own_values, model, [None] * ranks.size()) if model.shared else [_own_values(model)]
    for name in sorted(by_rank[0]):
        digest.update(name.encode() + b"".join(own[name] for own in by_rank if name in own))
    for pair in pairs:
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return digest.hexdigest()


def _own_values(model: Transformer, _: None = None) -> dict[str, bytes]:
    """What this rank has of the values that identify a model, by name; what is whole on all ranks, on the first one."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name.endswith((".lora_A", ".lora_B")) or (ranks.rank() > 0 and not is_shared_out(tensor)):
            continue
        start, own = own_part(tensor.detach())
        if "frozen_" not in name:
            stride = max(1, tensor.numel() // 1024)
            own = own[-start % stride :: stride]
        found[name] = own.float().cpu().numpy().tobytes()
    return found


def stored_reference(model: Transformer, pairs: list[PairIds], path: Path, max_tokens: int) -> torch.Tensor:
    """The reference log-probabilities, computed once and stored with what they were computed from."""
    mark = fingerprint(model, pairs)
    if path.is_file():
        stored = read_object(path)
        sides = [stored.take_list(side, float) for side in ("chosen", "rejected")]
        if stored.take("fingerprint", str) != mark:
            raise stored.fail("was computed with another model or other pairs; remove it to compute it again")
        if any(len(side) != len(pairs) for side in sides):
            raise stored.fail(f"should hold a number for each of the {len(pairs)} pairs; remove it to compute it again")
        return torch.tensor(sides, dtype=torch.float32).T.contiguous()
    reference = reference_logps(model, pairs, max_tokens)
    write_json(path, {"fingerprint": mark, "chosen": reference[:, 0].tolist(), "rejected": reference[:, 1].tolist()})
    return reference
