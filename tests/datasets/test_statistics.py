"""Table 1: counted by hand, on cleaned dialogues and as they stand, and on a real file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import dialogue

from selfevo.datasets.corpus import DataSettings, load_corpus
from selfevo.datasets.statistics import describe_dialogues
from selfevo.dialogue import Dialogue, Turn

DESCRIBE = Path(__file__).resolve().parents[2] / "examples" / "describe.py"
SAID = [("supporter", "hello"), ("seeker", "I am sad"), ("seeker", "so sad"), ("supporter", "why"), ("seeker", "work")]


def described(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(DESCRIBE), *arguments], capture_output=True, text=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "esconv.json"
    record = {"dialog": [{"speaker": who, "content": text, "annotation": {}} for who, text in SAID]}
    path.write_text(json.dumps([record] * 20))
    return path


def test_counts_by_hand() -> None:
    dialogue = Dialogue("d", tuple(Turn(who, text) for who, text in SAID))  # type: ignore[arg-type]
    assert describe_dialogues([dialogue, Dialogue("e", ())]) == {
        "sessions": 2,
        "session_length": 2.5,
        "utterance_length": 8 / 5,
        "seeker_utterance_length": 6 / 3,
        "supporter_utterance_length": 2 / 2,
    }
    assert set(describe_dialogues([]).values()) == {0}


def test_a_file_is_described_cleaned_or_as_it_stands(file: Path) -> None:
    assert described(str(file)).stdout.splitlines()[-1] == f"| {file} | 20 | 3.00 | 2.33 | 3.00 | 1.00 |"
    assert described(str(file), "--raw").stdout.splitlines()[-1] == f"| {file} | 20 | 5.00 | 1.60 | 2.00 | 1.00 |"
    bad = described(str(file.parent / "nowhere.json"))
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith("error: ")
    assert "there is no such file" in bad.stderr


def test_a_run_keeps_the_statistics_of_its_files(tmp_path: Path) -> None:
    path = tmp_path / "esconv.json"
    path.write_text(json.dumps([dialogue(number) for number in range(20)]))
    report = load_corpus(DataSettings(str(path)), iterations=1, seed=0).report()
    assert report["statistics"][str(path)]["session_length"] == 12.0  # type: ignore[index]


def test_esconvs_sessions_are_as_long_as_in_the_paper(shared: Path) -> None:
    """Of the test tenth; the paper's 22.58, 21.17, 19.90 and 22.44 are of all 1,295 sessions."""
    *_, last = described(str(shared / "data" / "esconv_test.json")).stdout.splitlines()
    length, words, seekers, supporters = (float(cell) for cell in last.split("|")[3:7])
    assert abs(length - 22.58) < 3
    assert abs(words - 21.17) < 3
    assert abs(seekers - 19.90) < 3
    assert abs(supporters - 22.44) < 3
