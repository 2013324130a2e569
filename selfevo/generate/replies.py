"""From conversations to texts: contexts cut to the window, replies sampled and kept on disk as they are finished.

A reply depends on its own index and prompt alone, so a killed rollout continues with the same replies: in float32, but
for a draw that lies within rounding of a boundary; in bfloat16 rounding is coarse, and depends on the batch's members.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from selfevo.datasets.encoding import fit_prompt
from selfevo.datasets.seeds import derive_seed
from selfevo.dialogue import Messages
from selfevo.files import Fields, FileError, append_jsonl, read_jsonl, resume_jsonl, write_jsonl
from selfevo.generate.decoder import SLOTS, generate
from selfevo.generate.form import Form
from selfevo.generate.sampling import Sampling
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.models.transformer import Transformer

R = TypeVar("R", bound="ReplySettings")


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
class _Request:
    """What is sampled for every prompt, as in ``sample_replies``."""

    sampling: Sampling
    max_new_tokens: int
    keep_last: int
    stop_when: Callable[[str], bool] | None
    form: Callable[[int], Form] | None
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
    stop_when: Callable[[str], bool] | None = None,
    form: Callable[[int], Form] | None = None,
    slots: int = SLOTS,
    label: str = "replies",
) -> list[Reply]:
    """One reply per conversation, in order, kept in ``path`` (JSON lines); what is there is not sampled again.

    A reply has at most ``max_new_tokens``, and at most a quarter of the model's window. ``stop_when`` sees the text so
    far whenever a token has closed a brace, and ends the reply. ``form`` makes the form in which a reply is written, of
    at most so many tokens. ``slots`` replies are decoded at a time, which bounds
    the memory of their keys and values. Until all are finished they are in ``PATH.unfinished``, in the order in which
    they came.
    """
    if not path.is_file():
        unfinished = path.with_name(f"{path.name}.unfinished")
        found = dict(_read(unfinished, resume_jsonl(unfinished)))
        if any(index >= len(prompts) for index in found):
            raise FileError(f"{unfinished}: holds other replies than the {len(prompts)} wanted; it is of another run")

        def keep(index: int, reply: Reply) -> None:
            found[index] = reply
            append_jsonl(unfinished, _as_record(index, reply))

        missing = {index: prompt for index, prompt in enumerate(prompts) if index not in found}
        request = _Request(sampling, max_new_tokens, keep_last, stop_when, form, slots, label)
        _sample(model, tokenizer, missing, keep, request)
        write_jsonl(path, [_as_record(index, found[index]) for index in range(len(prompts))])
        unfinished.unlink(missing_ok=True)
    replies = _read(path, read_jsonl(path))
    if [index for index, _ in replies] != list(range(len(prompts))):
        raise FileError(f"{path}: holds other replies, or in another order, than the {len(prompts)} wanted; remove it")
    return [reply for _, reply in replies]


def reply_limit(model: Transformer, max_new_tokens: int) -> int:
    """The longest reply that is sampled where so many tokens are wanted: a short window is mostly for the context."""
    return min(max_new_tokens, model.config.max_positions // 4)


def _sample(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Mapping[int, Messages],
    keep: Callable[[int, Reply], None],
    request: _Request,
) -> None:
    """Samples a reply to each prompt, whose index is the key of its draws, and gives it to ``keep``."""
    window, stop_when = model.config.max_positions, request.stop_when
    max_new_tokens = reply_limit(model, request.max_new_tokens)
    form = None if request.form is None else request.form(max_new_tokens)
    fitted = {
        index: fit_prompt(tokenizer, prompt, window - max_new_tokens, keep_last=request.keep_last)
        for index, prompt in prompts.items()
    }
    ids = {index: prompt.ids for index, prompt in fitted.items() if prompt.ids is not None}
    for index in fitted.keys() - ids.keys():
        keep(index, Reply(None, turns_dropped=fitted[index].turns_dropped))
    indices = list(ids)

    def stop(reply: list[int]) -> bool:
        return stop_when is not None and "}" in tokenizer.decode(reply[-1:]) and stop_when(tokenizer.decode(reply))

    def finish(place: int, reply: list[int]) -> None:
        index, cut = indices[place], len(reply) == max_new_tokens and not stop(reply)
        if form is not None:
            cut = form.ends_full(reply)
        text = tokenizer.decode(reply)
        text = text.rstrip("\ufffd") if cut else text  # half of the character that the limit has cut in two
        keep(index, Reply(text.strip(), len(reply), cut, fitted[index].turns_dropped))

    generate(
        model, list(ids.values()), max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids, keys=indices,
        batch_size=request.slots, stop_when=None if stop_when is None else stop, form=form, on_reply=finish,
        progress=request.label, **vars(request.sampling),
    )  # fmt: skip


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
