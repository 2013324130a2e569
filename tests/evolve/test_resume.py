"""A run that is continued: from its own settings, elsewhere, with more iterations, and never with other inputs."""

# ruff: noqa: F811  (fixtures are imported)

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import faulty
import pytest
from iterate import parse
from runs import ITERATE, configuration, finished, records, world  # noqa: F401

from selfevo.evolve import EvolveConfig, RunError, evolve
from selfevo.evolve.run_folder import check_run, is_finished, open_run
from selfevo.files import FileError, append_jsonl, hold_folder, write_json

HARMLESS = ("twice", "trailing")  # to a ledger: its lines say the same
TINY: dict[str, Any] = {"limit": 3, "iterations": 0, "max_new_tokens": 4, "replay": ""}


@pytest.fixture(scope="module")
def small(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of M0 alone."""
    return evolve(configuration(world, tmp_path_factory.mktemp("runs") / "small", **TINY))


def contents(run: Path) -> dict[str, bytes]:
    """All that a run made; the times of steps are no result."""
    found = {}
    for path in run.rglob("*"):
        if path.is_file() and path.name not in ("ledger.jsonl", "config.json", "lock"):
            data = path.read_bytes()
            if path.name == "metrics.jsonl":
                data = json.dumps([{**record, "seconds": 0} for record in records(path)]).encode()
            found[str(path.relative_to(run))] = data
    return found


def test_a_run_with_more_iterations_is_the_run_that_had_them_from_the_beginning(world: Path, tmp_path: Path) -> None:
    """M0, then M1 and M2, then M3: the first two are what they were, and M3 goes through the dialogues of M1 again."""
    few: dict[str, Any] = {"limit": 8, "max_new_tokens": 4, "chosen": "golden", "replay": ""}
    whole = evolve(configuration(world, tmp_path / "whole", **few, iterations=3, seed_parts=2))
    run = evolve(configuration(world, tmp_path / "run", **few, iterations=0))
    assert not (run / "M1").exists()
    evolve(configuration(world, tmp_path / "run", **few, iterations=2), resume=True)
    before = contents(run)
    evolve(configuration(world, tmp_path / "run", **few, iterations=3), resume=True)
    after = contents(run)
    changed = {name for name, data in before.items() if after[name] != data}
    assert changed == {"eval/scores.json", "eval/table.md"}
    assert after == contents(whole)
    assert is_finished(check_run(configuration(world, tmp_path / "run", **few, iterations=3), resume=True))
    seeds = [[record["id"] for record in records(run / name / "pairs.jsonl")] for name in ("M1", "M2", "M3")]
    assert {one.split("#")[0] for one in seeds[2]} == {one.split("#")[0] for one in seeds[0]}
    assert not set(seeds[0]) & set(seeds[1])
    with pytest.raises(RunError, match=r"iterations was 3, now 2"):
        check_run(configuration(world, tmp_path / "run", **few, iterations=2), resume=True)
    with pytest.raises(RunError, match=r"seed_parts was 2, now 3"):
        check_run(configuration(world, tmp_path / "run", **few, iterations=3, seed_parts=3), resume=True)


def test_out_and_resume_alone_take_the_settings_from_the_run(small: Path, world: Path) -> None:
    config, resume, _ = parse(["--out", str(small), "--resume"])
    assert resume
    assert config == configuration(world, small, **TINY)
    config, *_ = parse(["--out", str(small), "--resume", "--iterations", "2", "--slots", "7"])
    assert config == configuration(world, small, **TINY | {"iterations": 2, "slots": 7})


def test_what_was_never_begun_is_not_continued_as_something_else(tmp_path: Path) -> None:
    faulty.assert_one_sentence(
        lambda: parse(["--out", str(tmp_path), "--resume"]), str(tmp_path), "no run to continue", kind="run folder"
    )
    config, *_ = parse(["--out", str(tmp_path), "--resume", "--limit", "2"])
    assert config.data.limit == 2


def test_settings_that_change_nothing_but_rounding_may_differ_and_are_noted(
    small: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(small, tmp_path / "run"))
    (run / "eval" / "scores.json").unlink()
    monkeypatch.chdir(world)
    config = configuration(
        world, run, **TINY | {"slots": 3, "max_tokens": 999, "checkpoint_activations": True, "device": "cpu"},
        backbone="backbone", esconv=f"../{world.name}/esconv.json",
        test="./test.json", synthetic=("extes.json",), dtype="float32",
    )  # fmt: skip
    (run / "data.json").unlink()  # it has the names of the files
    before = contents(run)
    evolve(config, resume=True)
    assert contents(run).items() >= before.items()
    stored = json.loads((run / "config.json").read_text())
    begun = json.loads((small / "config.json").read_text())
    assert stored["settings"] == begun["settings"]
    noted = {"slots": 3, "max_tokens": 999, "checkpoint_activations": True, "device": "cpu"}
    assert stored["continued"] == [{"settings": noted}]
    with pytest.raises(RunError, match=r"dtype was 'float32', now 'bfloat16'"):
        check_run(configuration(world, run, **TINY, dtype="bfloat16"), resume=True)


def test_another_version_of_torch_is_told_noted_and_in_the_table(
    small: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(small, tmp_path / "run"))
    stored = json.loads((run / "config.json").read_text())
    stored["versions"]["torch"] = "1.0"
    write_json(run / "config.json", stored)  # as our own code does, which enters it into the ledger
    (run / "eval" / "scores.json").unlink()
    evolve(configuration(world, run, **TINY), resume=True)
    said = "was begun with torch 1.0 and continued with torch 2."
    assert said in capsys.readouterr().err
    assert said in (run / "eval" / "table.md").read_text()
    assert list(json.loads((run / "config.json").read_text())["continued"][0]["versions"]) == ["torch"]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_another_backbone_is_refused(small: Path, world: Path, tmp_path: Path, file: str) -> None:
    backbone = Path(shutil.copytree(world / "backbone", tmp_path / "backbone"))
    changes = TINY | {"backbone": str(backbone)}
    check_run(configuration(world, small, **changes), resume=True)  # a copy elsewhere is the same
    data = bytearray((backbone / file).read_bytes())
    data[-2] ^= 1
    (backbone / file).write_bytes(data)
    faulty.assert_one_sentence(
        lambda: check_run(configuration(world, small, **changes), resume=True),
        str(backbone), file, "has changed since", kind="run folder",
    )  # fmt: skip


def test_a_backbone_with_a_file_more_or_less_is_refused(small: Path, world: Path, tmp_path: Path) -> None:
    backbone = Path(shutil.copytree(world / "backbone", tmp_path / "backbone"))
    (backbone / "chat_template.jinja").write_text("{{ messages }}")
    for _ in range(2):
        with pytest.raises(RunError, match=r"(chat_template.jinja|tokenizer_config.json) has changed since"):
            check_run(configuration(world, small, **TINY, backbone=str(backbone)), resume=True)
        (backbone / "chat_template.jinja").unlink(missing_ok=True)
        (backbone / "tokenizer_config.json").unlink(missing_ok=True)


def test_other_prompts_of_ones_own_are_refused(world: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"vanilla": "Listen."}')
    config = configuration(world, tmp_path / "run", **TINY, prompts_file=str(prompts))
    with open_run(config):
        pass
    check_run(config, resume=True)
    prompts.write_text('{"vanilla": "Listen!"}')
    with pytest.raises(RunError, match=r"prompts\.json: has changed since"):
        check_run(config, resume=True)


# Two processes, removed folders, kills


def test_a_second_process_is_told_who_works_in_the_folder_and_a_dead_one_does_not_matter(
    small: Path, world: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(small, tmp_path / "run"))
    code = (
        "import sys, time; from pathlib import Path; from selfevo.files import hold_folder\n"
        "with hold_folder(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    config = configuration(world, run, **TINY)
    before = contents(run)
    for work in (lambda: check_run(config, resume=True), lambda: evolve(config, resume=True)):
        said = faulty.assert_one_sentence(work, str(run), f"process {other.pid} on ", kind="run folder")
        assert "is working in it" in said
    assert contents(run) == before
    other.kill()
    other.wait()
    assert (run / "lock").read_text().startswith("process")  # it is the system's lock that counts
    evolve(config, resume=True)
    assert (run / "lock").read_text() == ""


def test_a_kill_before_the_settings_were_written_leaves_a_folder_to_begin_in(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json.0badcafe.partial", "lock", "ledger.jsonl"):
        (run / name).write_text("{")
    (run / "ledger.jsonl").write_text('{"file": "config.json", "sha256": "' + "0" * 64 + '"}\n{"fi')
    for resume in (True, False):
        check_run(configuration(world, run, **TINY), resume=resume)
    evolve(configuration(world, run, **TINY), resume=True)
    assert not list(run.glob("*.partial"))
    check_run(configuration(world, run, **TINY), resume=True)


@pytest.mark.parametrize(
    "at", ["data.json", "M0/metrics.jsonl", "M0/adapter_model.safetensors", "eval/M0.replies.jsonl"]
)
def test_a_run_folder_that_is_removed_is_not_made_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    config = configuration(world, tmp_path / "run", **TINY)
    put = os.replace

    def replace(source: Any, target: Any) -> None:
        if str(target).endswith(at):
            shutil.rmtree(config.out)
        put(source, target)

    monkeypatch.setattr(os, "replace", replace)
    faulty.assert_one_sentence(lambda: evolve(config), config.out, "was removed or renamed", kind="run folder")
    assert not Path(config.out).exists()


def test_a_folder_that_was_exchanged_is_left_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with hold_folder(run):
        write_json(run / "a.json", 1)
        run.rename(tmp_path / "moved")
        with hold_folder(tmp_path / "other"):
            run.mkdir()
            for write in (write_json, append_jsonl):
                with pytest.raises(FileError, match="was removed or renamed"):
                    write(run / "M0" / "b.json", 1)
            assert list(run.iterdir()) == []
            write_json(tmp_path / "moved" / "c.json", 1)  # elsewhere is nobody's business


# What a run reads back


def test_what_was_changed_since_it_was_written_is_refused_and_what_is_missing_is_made_again(
    small: Path, world: Path, tmp_path: Path
) -> None:
    config = configuration(world, tmp_path / "run", **TINY)
    run = Path(shutil.copytree(small, config.out))
    (run / "eval" / "scores.json").unlink()
    lines = (run / "eval" / "M0.replies.jsonl").read_text().splitlines(keepends=True)
    (run / "eval" / "M0.replies.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    said = faulty.assert_one_sentence(lambda: evolve(config, resume=True), "eval/M0.replies.jsonl", kind="run folder")
    assert "put it back as it was, or remove it" in said
    (run / "eval" / "M0.replies.jsonl").unlink()
    (run / "eval" / "M0.json").unlink()
    evolve(config, resume=True)
    assert contents(run) == contents(small)


@pytest.mark.parametrize("damage", sorted(faulty.BROKEN))
def test_every_file_of_a_run_is_checked_before_anything_is_loaded(
    small: Path, world: Path, tmp_path: Path, damage: str
) -> None:
    """The same damage to each in turn; what is missing is left to whoever reads it."""
    run = tmp_path / "run"
    files = [path.relative_to(small) for path in sorted(small.rglob("*")) if path.is_file()]
    bound = [path for path in files if path.suffix in (".json", ".jsonl")]
    assert len(bound) > 12
    for name in bound:
        faulty.copy_of(small, run)
        faulty.BROKEN[damage](run / name)
        faulty.assert_one_sentence(
            lambda: check_run(configuration(world, run, **TINY), resume=True), name.name, kind="run folder",
            check=lambda _, name=name: damage == "missing" or (name.name == "ledger.jsonl" and damage in HARMLESS),
        )  # fmt: skip


# A full disk


def run_to_the_end(config: EvolveConfig, failed: list[str]) -> int:
    """Resumes until the run is finished; whenever the disk is full, it has to say so and to leave nothing half done."""
    for attempt in range(100):
        failed.clear()
        try:
            evolve(config, resume=True)
            return attempt
        except FileError as error:
            faulty.COUNTS["run folder"] += 1
            (name,) = failed
            faulty.check_sentence(str(error), name, "cannot be written (No space left on device)")
        assert not list(Path(config.out).rglob("*.partial"))
    raise AssertionError("it never ends")


@pytest.mark.parametrize("operation", ["replace", "fsync"])
def test_a_disk_that_is_full_at_any_file_ends_the_run_in_one_sentence_and_it_goes_on_afterwards(
    small: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    failed: list[str] = []
    done: set[Path] = set()
    real = getattr(os, operation)

    def call(what: Any, *target: Any) -> Any:
        """Fails once for every file, the ledger included."""
        path = Path(target[0] if target else os.readlink(f"/proc/self/fd/{what}"))
        path = path.with_suffix("").with_suffix("") if path.suffix == ".partial" else path
        if path not in done:
            done.add(path)
            failed.append(path.name)
            faulty.no_space()
        return real(what, *target)

    monkeypatch.setattr(os, operation, call)
    config = configuration(world, tmp_path / "run", **TINY)
    assert run_to_the_end(config, failed) > 15
    assert contents(Path(config.out)) == contents(small)


def test_an_appended_line_is_whole_or_not_there(tmp_path: Path) -> None:
    """With a real limit on the size of files, in a process of its own."""
    code = (
        "import os, resource, signal, sys, torch\n"
        "from safetensors.torch import save_file\n"
        "from selfevo.files import append_jsonl, replace_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "def save():\n"
        "    with replace_file('a.safetensors') as path: save_file({'a': torch.zeros(5000)}, path)\n"
        "def append():\n"
        "    for number in range(1000): append_jsonl('b.jsonl', {'number': number, 'text': 'x' * 50})\n"
        "for work in (save, append):\n"
        "    try: work()\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    why = "cannot be written (File too large); choose or free another place"
    assert done.stdout == f"a.safetensors: {why}\nb.jsonl: {why}\n", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["b.jsonl"]
    text = (tmp_path / "b.jsonl").read_text()
    assert text.endswith("}\n")
    assert 4000 < len(text) <= 4096
