"""Shared fixtures: the folder of real data, and small random models."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from selfevo.models import ModelConfig, Transformer

SHARED = Path(__file__).resolve().parents[2] / "shared"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network
# One thread unless CI asks for more: the models here are too small for threads to do anything but wait.
torch.set_num_threads(int(os.environ.get("SELFEVO_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real dialogues, tokenizers and checkpoint beside the repository; CI must have them."""
    if not SHARED.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI runs need the shared test data, and {SHARED} is not there")
        pytest.skip(f"the shared test data is not at {SHARED}")
    return SHARED


def tiny_config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "family": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_positions": 256,
    }  # fmt: skip
    values |= changes
    values.setdefault("windows", (None,) * int(str(values["num_layers"])))
    return ModelConfig(**values)  # type: ignore[arg-type]


def tiny_model(seed: int = 0, **changes: object) -> Transformer:
    """Random weights, large enough that tokens matter to one another."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(tiny_config(**changes))
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many cases of the fault catalogue (tests/faults/) ran, by kind."""
    counts: Counter[str] = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport) and report.when == "teardown":
            for name, value in report.user_properties:
                if name == "fault cases" and isinstance(value, dict):
                    counts.update(value)
    if counts:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
        terminalreporter.write_line(f"{counts.total()} fault cases: {kinds}")
