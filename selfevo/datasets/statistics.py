"""Statistics of dialogues, as in Table 1."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from selfevo.dialogue import Dialogue

Statistics = dict[str, float]


def describe_dialogues(dialogues: Sequence[Dialogue]) -> Statistics:
    """Sessions, mean utterances a session, and mean words an utterance: of all, of seekers, of supporters.

    Words are separated by white space. The paper counts after utterances of one speaker in a row are joined, which
    ``clean_dialogue`` does. A mean over nothing is 0.
    """
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]

    def mean_words(*speakers: str) -> float:
        lengths = [len(turn.text.split()) for turn in turns if turn.speaker in speakers]
        return fmean(lengths) if lengths else 0.0

    return {
        "sessions": len(dialogues),
        "session_length": len(turns) / max(1, len(dialogues)),
        "utterance_length": mean_words("seeker", "supporter"),
        "seeker_utterance_length": mean_words("seeker"),
        "supporter_utterance_length": mean_words("supporter"),
    }
