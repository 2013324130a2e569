"""From conversations to texts: contexts cut to the window, replies sampled and kept on disk as they are finished.

A reply depends on its own index and prompt alone, so a killed rollout continues with the same replies: in float32, but
for a draw that lies within rounding of a boundary; in bfloat16 rounding is coarse, and depends on the batch's members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch

from selfevo.datasets.encoding import fit_prompt
from selfevo.datasets.seeds import derive_seed
from selfevo.dialogue import Messages
from selfevo.files import Fields, FileError, append_jsonl, read_jsonl, resume_jsonl, write_jsonl
from selfevo.generate.decoder import SLOTS, generate
from selfevo.generate.form import Form
from selfevo.generate.sampling import Sampling
from selfevo.kernels import ranks
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.models.transformer import Transformer
from selfevo.trie.packing import pack
from selfevo.trie.trie import as_ids

R = TypeVar("R", bound="ReplySettings")
_PACKS_PER_RANK = 8  # of prompts: more balance the ranks better, fewer leave more prompts together


@dataclass(frozen=True)
class ReplySettings:
    """How replies are sampled, and how many at a time."""

    sampling: Sampling = Sampling()
    max_new_tokens: Annotated[int, "longest reply, in tokens"] = 128
    slots: Annotated[int, "replies decoded at a time: more is faster, and on a CPU cheap; fewer take less memory"] = (
        SLOTS
    )

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def seeded(self: R, seed: int, *names: str | int) -> R:
        """The same settings with the seed of these names (see ``derive_seed``)."""
        return replace(self, sampling=replace(self.sampling, seed=derive_seed(seed, *names)))


@dataclass(frozen=True)
class Reply:
    """A sampled text; ``cut`` says that the token limit ended it, or in a form its last slot. ``text`` is None where
    the prompt did not fit."""

    text: str | None
    tokens: int = 0
    cut: bool = False
    turns_dropped: int = 0


@dataclass(frozen=True)
class _Part:
    """The replies that one rank samples: prompts as ids by their index, which is the key of their draws, and how many
    turns each has lost. Finished replies are appended to ``path``."""

    prompts: dict[int, list[int]]
    turns_dropped: dict[int, int]
    path: Path
    tokenizer: ChatTokenizer
    sampling: Sampling
    max_new_tokens: int
    stop_when: Callable[[str], object] | None
    form: Form | None
    slots: int
    label: str


def sample_replies(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Messages],
    path: Path,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    keep_last: int = 1,
    stop_when: Callable[[str], object] | None = None,
    form: Callable[[int], Form] | None = None,
    slots: int = SLOTS,
    label: str = "replies",
) -> list[Reply]:
    """One reply per conversation, in order, kept in ``path`` (JSON lines); what is there is not sampled again.

    A reply has at most ``max_new_tokens``, and at most a quarter of the model's window. ``stop_when`` sees the text so
    far whenever a token has closed a brace, and ends the reply; under several ranks it has to be picklable. ``form``
    makes the form in which a reply is written, of at most so many tokens. ``slots`` replies are decoded at a time by
    each rank, which bounds the memory of their keys and values. Prompts are dealt to the ranks such that those with a
    common beginning, as the turns of a dialogue have, stay together. Until all are finished, replies are in
    ``PATH.unfinished``, those of rank R in ``PATH.unfinished-R``, in the order in which they came.
    """
    if not path.is_file():
        unfinished = [path.with_name(f"{path.name}.unfinished"), *path.parent.glob(f"{path.name}.unfinished-*")]
        found = {index: reply for file in unfinished for index, reply in _read(file, resume_jsonl(file))}
        if any(index >= len(prompts) for index in found):
            raise FileError(
                f"{unfinished[0]}: holds other replies than the {len(prompts)} wanted; it is of another run"
            )
        window, max_new_tokens = model.config.max_positions, reply_limit(model, max_new_tokens)
        fitted = {
            index: fit_prompt(
                tokenizer, prompt, window - max_new_tokens, keep_last=keep_last, name=f"{label}, conversation {index}"
            )
            for index, prompt in enumerate(prompts)
            if index not in found
        }
        ids = {index: list(prompt.ids) for index, prompt in fitted.items() if prompt.ids is not None}
        found |= {i: Reply(None, turns_dropped=fitted[i].turns_dropped) for i in fitted.keys() - ids.keys()}
        whole = _Part(
            ids, {index: prompt.turns_dropped for index, prompt in fitted.items()}, unfinished[0], tokenizer, sampling,
            max_new_tokens, stop_when, None if form is None else form(max_new_tokens), slots, label,
        )  # fmt: skip
        for part in ranks.deal(_sample, model, _dealt(whole)):
            found |= part
        write_jsonl(path, [_as_record(index, found[index]) for index in range(len(prompts))])
        for file in [unfinished[0], *path.parent.glob(f"{path.name}.unfinished-*")]:
            file.unlink(missing_ok=True)
    replies = _read(path, read_jsonl(path))
    if [index for index, _ in replies] != list(range(len(prompts))):
        raise FileError(f"{path}: holds other replies, or in another order, than the {len(prompts)} wanted; remove it")
    return [reply for _, reply in replies]


def reply_limit(model: Transformer, max_new_tokens: int) -> int:
    """The longest reply that is sampled where so many tokens are wanted: a short window is mostly for the context."""
    return min(max_new_tokens, model.config.max_positions // 4)


def _dealt(whole: _Part) -> list[_Part]:
    """The parts of all ranks: packs of prompts that share a beginning, dealt by their tokens and replies."""
    if ranks.size() == 1:
        return [whole]
    indices = list(whole.prompts)
    total = sum(map(len, whole.prompts.values()))
    size = total // (_PACKS_PER_RANK * ranks.size())
    packs = pack([[as_ids(ids)] for ids in whole.prompts.values()], max(1, size))
    shares = ranks.share_out([len(members) for members in packs])
    parts = []
    for rank, share in enumerate(shares):
        own = {indices[place]: whole.prompts[indices[place]] for number in share for place in packs[number]}
        path = whole.path.with_name(f"{whole.path.name}-{rank}") if rank else whole.path
        parts.append(replace(whole, prompts=own, path=path))
    return parts


def _sample(model: Transformer, part: _Part) -> dict[int, Reply]:
    """One rank's replies, by index, each kept on disk as it is finished."""
    tokenizer, stop_when, indices = part.tokenizer, part.stop_when, list(part.prompts)
    found: dict[int, Reply] = {}

    def stop(reply: list[int]) -> bool:
        return "}" in tokenizer.decode(reply[-1:]) and bool(stop_when and stop_when(tokenizer.decode(reply)))

    def finish(place: int, reply: list[int]) -> None:
        index, cut = indices[place], len(reply) == part.max_new_tokens and not stop(reply)
        if part.form is not None:
            cut = part.form.ends_full(reply)
        text = tokenizer.decode(reply)
        text = text.rstrip("\ufffd") if cut else text  # half of the character that the limit has cut in two
        found[index] = Reply(text.strip(), len(reply), cut, part.turns_dropped[index])
        append_jsonl(part.path, _as_record(index, found[index]))

    generate(
        model, list(part.prompts.values()), max_new_tokens=part.max_new_tokens, stop_ids=tokenizer.stop_ids,
        keys=indices, batch_size=part.slots, stop_when=None if stop_when is None else stop, form=part.form,
        on_reply=finish, progress=part.label if ranks.rank() == 0 else None, **vars(part.sampling),
    )  # fmt: skip
    with torch.no_grad():
        model.keep_pace()
    return found


def _as_record(index: int, reply: Reply) -> dict[str, Any]:
    return {"index": index, **vars(reply)}


def _read(path: Path, records: Sequence[Any]) -> list[tuple[int, Reply]]:
    """The replies in a file, each with its index."""
    entries = [Fields(values, f"{path}, reply {number}") for number, values in enumerate(records)]
    return [
        (
            entry.take("index", int, low=0),
            Reply(
                entry.take("text", str, None),
                entry.take("tokens", int, 0, low=0),
                entry.take("cut", bool, False),
                entry.take("turns_dropped", int, 0, low=0),
            ),
        )
        for entry in entries
    ]
