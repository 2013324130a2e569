"""Public dialogue corpora as typed records, and preference pairs."""

from selfevo.datasets.pairs import Pair, read_pairs
from selfevo.datasets.readers import (
    EXTES_STRATEGIES,
    load_alpaca,
    load_dialogues,
    load_esconv,
    load_extes,
    load_messages,
    load_serveforemo,
)

__all__ = [
    "EXTES_STRATEGIES",
    "Pair",
    "load_alpaca",
    "load_dialogues",
    "load_esconv",
    "load_extes",
    "load_messages",
    "load_serveforemo",
    "read_pairs",
]
