"""A study that is served from a thread, with a responder that answers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from participants import Participant, answer_at_once, serving

from selfevo.study.answer import Answerer
from selfevo.study.pages import Pages
from selfevo.study.plan import StudySettings
from selfevo.study.store import Store
from selfevo.study.texts import read_texts


def study_settings(**changes: Any) -> StudySettings:
    values = {"mode": "pointwise", "models": ("M0", "M1"), "turns": 2, "aspects": ("Empathy", "Overall"), "source": "s"}
    return StudySettings(**(values | changes))


@dataclass
class Site:
    store: Store
    pages: Pages
    port: int

    def participant(self, name: str = "somebody") -> Participant:
        return Participant("127.0.0.1", self.port, name)

    def content(self) -> str:
        """All that is stored, but for times."""
        return repr([(s.id, s.state, s.comment, s.turns, s.scores) for s in self.store.sessions()])


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Call it with changes of the settings; ``respond`` and what ``Pages`` takes may be given, too."""
    with ExitStack() as stack:

        def make(respond: Any = answer_at_once, pages: dict[str, Any] | None = None, **changes: Any) -> Site:
            texts = read_texts(tmp_path / "texts")
            store = Store(tmp_path, study_settings(**{"aspects": tuple(texts.aspects)} | changes))
            answerer = Answerer(store, respond)
            shown = Pages(store, texts, answerer.wake, lambda text: "a word beyond" not in text, **(pages or {}))
            stack.callback(store.close)
            return Site(store, shown, stack.enter_context(serving(shown, answerer)))

        yield make
