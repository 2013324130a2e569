"""Hands each test's counts of fault cases on to the report at the end (tests/conftest.py), from other processes too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import faulty
import pytest


@pytest.fixture(autouse=True)
def _count_cases(request: pytest.FixtureRequest) -> Iterator[None]:
    before = Counter(faulty.COUNTS)
    yield
    request.node.user_properties.append(("fault cases", dict(faulty.COUNTS - before)))
