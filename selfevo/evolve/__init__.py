"""The self-evolution loop and what belongs to it: ``evolve(EvolveConfig(...))``, and the parts of its settings."""

from selfevo.datasets.corpus import DataSettings
from selfevo.evolve.loop import EvolveConfig, evolve, read_corpus
from selfevo.evolve.refine import RefineSettings
from selfevo.evolve.run import BackboneSettings, RunConfig, RunError, load_backbone
from selfevo.evolve.run_folder import read_settings
from selfevo.training.settings import AdapterSettings, PreferenceSettings, TrainSettings

__all__ = [
    "AdapterSettings",
    "BackboneSettings",
    "DataSettings",
    "EvolveConfig",
    "PreferenceSettings",
    "RefineSettings",
    "RunConfig",
    "RunError",
    "TrainSettings",
    "evolve",
    "load_backbone",
    "read_corpus",
    "read_settings",
]
