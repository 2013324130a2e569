"""A local backbone that answers conversations, as an endpoint does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from selfevo.datasets.seeds import derive_seed
from selfevo.dialogue import Messages
from selfevo.evaluation.ask_json import Answer, request_hash
from selfevo.generate.decoder import SLOTS
from selfevo.generate.replies import sample_replies
from selfevo.generate.sampling import Sampling
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.models.transformer import Transformer


class LocalResponder:
    """A local backbone; a batch of answers is one file in ``folder``, resumed as every rollout is.

    A conversation that does not fit into the window loses its oldest exchanges.
    """

    def __init__(
        self, model: Transformer, tokenizer: ChatTokenizer, name: str, folder: Path,
        *, sampling: Sampling, max_new_tokens: int = 384, slots: int = SLOTS,
    ) -> None:  # fmt: skip
        self._model, self._tokenizer, self._name, self._folder = model, tokenizer, name, folder
        self._sampling, self._max_new_tokens, self._slots = sampling, max_new_tokens, slots

    @property
    def name(self) -> str:
        return self._name

    def answer(self, conversations: Sequence[Messages], *, attempt: int = 1, label: str = "") -> list[Answer]:
        asked = [[dict(message) for message in messages] for messages in conversations]
        request = {"name": self.name, "conversations": asked, "attempt": attempt, "tokens": self._max_new_tokens}
        replies = sample_replies(
            self._model, self._tokenizer, asked, self._folder / f"{request_hash(request | vars(self._sampling))}.jsonl",
            sampling=replace(self._sampling, seed=derive_seed(self._sampling.seed, "attempt", attempt)),
            max_new_tokens=self._max_new_tokens, slots=self._slots, label=label or self.name,
        )  # fmt: skip
        return [
            Answer(None, "too_long") if r.text is None else Answer(r.text, "cut_at_limit" if r.cut else "")
            for r in replies
        ]
