"""Replies for those who wait: one thread gathers them and lets each model answer its participants in one batch."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfevo.datasets.encoding import FittedPrompt, fit_prompt
from selfevo.datasets.prompts import reply_prompt
from selfevo.datasets.seeds import derive_seed
from selfevo.dialogue import Turn, to_messages
from selfevo.generate import generate
from selfevo.generate.replies import ReplySettings
from selfevo.lora import load_adapter, remove_adapters
from selfevo.models import ChatTokenizer, Transformer
from selfevo.study.store import Store

RETRY = 5.0  # seconds after an error


@dataclass(frozen=True)
class Request:
    """A conversation to answer; the draws of the reply depend on ``key`` alone, so that one lost in a kill is written
    again as it was."""

    context: tuple[Turn, ...]
    key: int


# Called as respond(model, requests, on_reply): on_reply gets the index and the text of each reply as it is finished.
Respond = Callable[[str, Sequence[Request], Callable[[int, str], None]], None]


class Models:
    """Several adapters on one backbone (None: the bare one), by name; each answers as the run samples replies."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: ChatTokenizer,
        adapters: Mapping[str, Path | None],
        replies: ReplySettings,
        system: str,
    ) -> None:
        self.model, self.tokenizer, self.adapters = model, tokenizer, adapters
        self.replies, self.system = replies, system
        self.room = min(replies.max_new_tokens, model.config.max_positions // 4)
        self.worn: str | None = None

    def fits(self, text: str) -> bool:
        """Whether what a participant says leaves room for a reply in the model's window."""
        return self._fit((Turn("seeker", text),)).ids is not None

    def _fit(self, context: Sequence[Turn]) -> FittedPrompt:
        prompt = reply_prompt(to_messages(context), self.system)
        return fit_prompt(self.tokenizer, prompt, self.model.config.max_positions - self.room)

    def respond(self, name: str, requests: Sequence[Request], on_reply: Callable[[int, str], None]) -> None:
        """Lets one model answer all requests in one batch; a conversation longer than its window loses its oldest
        turns."""
        if self.worn != name:
            remove_adapters(self.model)
            if (adapter := self.adapters[name]) is not None:
                load_adapter(self.model, adapter)
            self.worn = name
        prompts = [self._fit(request.context).ids or [] for request in requests]
        generate(
            self.model, prompts, max_new_tokens=self.room, stop_ids=self.tokenizer.stop_ids,
            keys=[request.key for request in requests], batch_size=self.replies.slots,
            on_reply=lambda index, ids: on_reply(index, self.tokenizer.decode(ids).strip()),
            **vars(self.replies.sampling),
        )  # fmt: skip


class Answerer(threading.Thread):
    """The thread that writes replies, of all who wait for one model together; ``wake`` it when somebody waits."""

    def __init__(self, store: Store, respond: Respond) -> None:
        super().__init__(name="answerer", daemon=True)
        self._store, self._respond = store, respond
        self._wake, self._ended = threading.Event(), threading.Event()

    def wake(self) -> None:
        self._wake.set()

    def end(self) -> None:
        """Ends the thread, after the batch that it is at."""
        self._ended.set()
        self._wake.set()
        self.join()

    def run(self) -> None:
        while not self._ended.is_set():
            self._wake.clear()
            try:
                if not self._answer_one_model():
                    self._wake.wait()
            except Exception as error:  # a participant waits on; the researcher is told
                print(
                    f"error: no reply could be written ({type(error).__name__}: {error}); trying again", file=sys.stderr
                )
                self._ended.wait(RETRY)

    def _answer_one_model(self) -> bool:
        """Answers all who wait for the model of the one who has waited longest; False if nobody waits."""
        waiting = self._store.waiting()
        if not waiting:
            return False
        session, side = waiting[0]
        name = session.turns[-1].models[side]
        batch = [(session, side) for session, side in waiting if session.turns[-1].models[side] == name]
        seed = self._store.settings.seed
        requests = [
            Request(session.context(), derive_seed(seed, "study", "reply", session.place, len(session.turns), side))
            for session, side in batch
        ]

        def keep(index: int, text: str) -> None:
            session, side = batch[index]
            self._store.answer(session.id, len(session.turns), side, text)

        self._respond(name, requests, keep)
        return True
