"""A local backbone that answers conversations, as an endpoint does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from selfevo.datasets.seeds import derive_seed
from selfevo.dialogue import Messages
from selfevo.evaluation.ask_json import Answer, request_hash
from selfevo.generate.decoder import SLOTS
from selfevo.generate.form import Form
from selfevo.generate.json_form import json_form, template_in
from selfevo.generate.replies import sample_replies
from selfevo.generate.sampling import Sampling
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.models.transformer import Transformer


class LocalResponder:
    """A local backbone; a batch of answers is one file in ``folder``, resumed as every rollout is. ``content`` (a hash
    of the backbone) tells its answers from those of another one that had the same name.

    A conversation that does not fit into the window loses its oldest exchanges. With ``guided`` the decoder writes the
    keys and the punctuation of the JSON object that the requests show as the form of an answer, and every answer is
    such an object; ValueError is raised where they show none, or where it does not fit into ``max_new_tokens``.
    """

    def __init__(
        self, model: Transformer, tokenizer: ChatTokenizer, name: str, folder: Path,
        *, sampling: Sampling, max_new_tokens: int = 384, slots: int = SLOTS, guided: bool = False, content: str = "",
    ) -> None:  # fmt: skip
        self._content = content
        self._model, self._tokenizer, self._name, self._folder = model, tokenizer, name, folder
        self._sampling, self._max_new_tokens, self._slots, self._guided = sampling, max_new_tokens, slots, guided

    @property
    def name(self) -> str:
        return self._name

    def answer(self, conversations: Sequence[Messages], *, attempt: int = 1, label: str = "") -> list[Answer]:
        asked = [[dict(message) for message in messages] for messages in conversations]
        request = {
            "name": self.name,
            "content": self._content,
            "conversations": asked,
            "attempt": attempt,
            "tokens": self._max_new_tokens,
        }
        if self._guided:
            request["guided"] = True  # not noted otherwise: earlier versions had no choice
        replies = sample_replies(
            self._model, self._tokenizer, asked, self._folder / f"{request_hash(request | vars(self._sampling))}.jsonl",
            sampling=replace(self._sampling, seed=derive_seed(self._sampling.seed, "attempt", attempt)),
            max_new_tokens=self._max_new_tokens, slots=self._slots, label=label or self.name,
            form=self._form(asked) if self._guided else None,
        )  # fmt: skip
        return [
            Answer(None, "too_long", final=True)
            if r.text is None
            else Answer(r.text, "cut_at_limit" if r.cut and not self._guided else "")
            for r in replies
        ]

    def _form(self, conversations: Sequence[Messages]) -> Callable[[int], Form]:
        """Makes the form that all requests show, of at most so many tokens."""
        shown = [template_in(messages[-1]["content"]) for messages in conversations]
        template = shown[0] if shown else {"": ""}
        if template is None or any(other != template for other in shown):
            raise ValueError(f"{self.name}: a guided judge needs requests that show one JSON object as their answer")
        return lambda tokens: json_form(self._tokenizer, self._model.config.vocab_size, template, tokens)
