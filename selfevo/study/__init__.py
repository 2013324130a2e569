"""The studies in which people judge: pages to talk to models on, and what came of them (the paper's section 3.4.1)."""

from selfevo.study.plan import MODES, StudySettings
from selfevo.study.store import RefusedError, Store

__all__ = ["MODES", "RefusedError", "Store", "StudySettings"]
