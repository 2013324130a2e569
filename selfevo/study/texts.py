"""What participants read: plain texts in ``STUDY/texts``, which the researcher edits; ours are what they begin as."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from selfevo.files import FileError, read_text, write_text

_OWN = Path(__file__).parent / "texts"
NAMES = ("title", "notice", "help", "consent", "guidelines", "thanks", "aspects")


@dataclass(frozen=True)
class Texts:
    """The texts by the names of their files; ``aspects`` asks about each aspect that is rated, by its name."""

    title: str
    notice: str
    help: str
    consent: str
    guidelines: str
    thanks: str
    aspects: dict[str, str]


def read_texts(folder: Path) -> Texts:
    """The texts of a study, those that are missing written first. Raises FileError for an empty one, and for a line of
    ``aspects.txt`` that is not a name, a colon and a question."""
    texts = {}
    for name in NAMES:
        path = folder / f"{name}.txt"
        if not path.exists():
            write_text(path, read_text(_OWN / f"{name}.txt"))
        texts[name] = read_text(path).strip()
        if not texts[name]:
            raise FileError(f"{path}: is empty; write what participants are to read, or remove it to get ours again")
    path, aspects = folder / "aspects.txt", dict[str, str]()
    for number, line in enumerate(texts.pop("aspects").splitlines(), 1):
        name, colon, question = (part.strip() for part in line.partition(":"))
        if not (name and colon and question) or name in aspects:
            raise FileError(f"{path}, line {number}: should be the name of another aspect, a colon and a question")
        aspects[name] = question
    return Texts(**texts, aspects=aspects)


def read_scenarios(path: Path | None) -> tuple[str, ...]:
    """The situations to talk about, separated by blank lines in a text file. Raises FileError where there is none."""
    parts = [] if path is None else read_text(path).replace("\r\n", "\n").split("\n\n")
    scenarios = tuple(part.strip() for part in parts if part.strip())
    if path is not None and not scenarios:
        raise FileError(f"{path}: holds no scenario; write each as a paragraph, with a blank line between two")
    return scenarios
