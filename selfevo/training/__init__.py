"""Training adapters: one loop, the two objectives, and the stages of a run."""

from selfevo.training.loop import train
from selfevo.training.memory import describe_memory, estimate_memory, keep_freed_memory
from selfevo.training.objectives import DPOObjective, Objective, PairIds, SFTObjective, both_sides
from selfevo.training.reference import reference_logps
from selfevo.training.settings import AdapterSettings, PreferenceSettings, TrainSettings

__all__ = [
    "AdapterSettings",
    "DPOObjective",
    "Objective",
    "PairIds",
    "PreferenceSettings",
    "SFTObjective",
    "TrainSettings",
    "both_sides",
    "describe_memory",
    "estimate_memory",
    "keep_freed_memory",
    "reference_logps",
    "train",
]
