"""The layout of an evaluation folder and of a run folder: test turns, replies, stages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from selfevo.dialogue import Example, Turn, to_messages
from selfevo.files import FileError, read_json, read_jsonl, write_jsonl

VANILLA = "vanilla"  # the name of the backbone without any adapter
# The stages of Decoupled ESC, in the order in which they are trained.
DECOUPLED_STAGES = ("planner-sft", "generator-sft", "joint-sft", "planner-dpo", "generator-dpo")
_STAGE = re.compile(r"M(0|[1-9]\d*)")


def is_stage(name: str) -> bool:
    """Whether a name is that of a model of the loop: M0, M1, ..."""
    return _STAGE.fullmatch(name) is not None


def stage_names(run: Path) -> list[str]:
    """The stages that have a folder in a run, in order: ``["M0", "M1", "M2"]``, or those of Decoupled ESC."""
    if not (run / "config.json").is_file():
        raise ValueError(f"{run}: is no run folder (it has no config.json); give one that examples/iterate.py wrote")
    found = sorted((path.name for path in run.iterdir() if path.is_dir() and is_stage(path.name)), key=stage_order)
    return found or [name for name in DECOUPLED_STAGES if (run / name).is_dir()]


def failed_reflections(run: Path) -> list[str]:
    """A sentence for each stage of a run more than half of whose reflections could not be used, with what to do.

    The golden reply is then the chosen one of most pairs, and what is learnt is to prefer it to sampled replies.
    """
    guided = read_json(run / "config.json")["settings"].get("reflection") == "guided"
    remedy = "" if guided else " --reflection guided has the decoder write the JSON."
    sentences = []
    for stage in stage_names(run):
        usable, total = used_reflections(run / stage)
        if 2 * usable < total:
            sentences.append(
                f"{stage}: {total - usable} of {total} reflections were unusable: most of its pairs compare golden "
                f"with sampled replies, not refined ones.{remedy}"
            )
    return sentences


def diverged_stages(run: Path) -> list[str]:
    """A sentence for each stage of a run that ended worse than it began, as with a learning rate that is too high.

    That is where no held-out loss is below that before the first step; where nothing was held out, where the mean
    training loss of the last tenth of the steps is more than half as much again as that of the first step.
    """
    sentences = []
    for stage in stage_names(run):
        path = run / stage / "metrics.jsonl"
        records = read_jsonl(path) if path.is_file() else []
        held_out = [record["held_out"]["loss"] for record in records if "held_out" in record]
        if held_out and "held_out_before" in records[0]:
            before, after, kind = records[0]["held_out_before"]["loss"], min(held_out), "held-out"
            worse = after > before
        else:
            last = [record["loss"] for record in records[-max(1, len(records) // 10) :]]
            before, after, kind = (records[0]["loss"], fmean(last), "training") if last else (0.0, 0.0, "")
            worse = after > 1.5 * before
        if worse:
            sentences.append(
                f"{stage}: diverged: its {kind} loss was {before:.3f} at the start and {after:.3f} at the end, so it "
                "is worse than the model that it began from. A lower learning rate may help."
            )
    return sentences


def used_reflections(stage: Path) -> tuple[int, int]:
    """Of how many of its replies' reflections a stage could use, and how many replies it could reflect on."""
    path = stage / "filter.json"
    counts = read_json(path) if path.is_file() else {}
    dropped = counts.get("reply_prompt_too_long_dropped", 0) + counts.get("empty_reply_dropped", 0)
    total = counts.get("examples", 0) - dropped
    return total - counts.get("golden_for_missing_reflection", 0), total


def read_replies(path: Path) -> list[str | None]:
    """The texts of a ``NAME.replies.jsonl``, in the order of the test turns; None where the prompt did not fit."""
    try:
        return [record["text"] for record in read_jsonl(path)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: holds no replies as written by this library: {error!r}") from error


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """Keeps the test turns in ``folder``; raises FileError where it holds answers to other ones."""
    path = folder / "examples.jsonl"
    records = [
        {
            "id": example.id,
            "dialogue": example.dialogue,
            "turn": example.turn,
            "context": to_messages(example.context),
            "golden": example.golden.text,
            "strategies": list(example.golden.strategies),
        }
        for example in examples
    ]
    if not path.is_file():
        write_jsonl(path, records)
    elif read_jsonl(path) != records:
        raise FileError(f"{path}: holds other test turns; give another folder, or the same test file and limit")


def read_examples(folder: Path) -> list[Example]:
    """The test turns of an evaluation folder."""
    path = folder / "examples.jsonl"
    examples = []
    for index, record in enumerate(read_jsonl(path)):
        try:
            context = tuple(
                Turn("seeker" if message["role"] == "user" else "supporter", message["content"])
                for message in record["context"]
            )
            golden = Turn("supporter", record["golden"], tuple(record["strategies"]))
            examples.append(Example(record["dialogue"], record["turn"], context, golden))
        except (KeyError, TypeError) as error:
            raise FileError(f"{path}: record {index} is not a test turn of this library: {error!r}") from error
    return examples


def read_answers(folder: Path, name: str) -> list[tuple[Example, str]]:
    """The test turns that a model answered, with its replies; those that did not fit into its window are left out."""
    examples, path = read_examples(folder), folder / f"{name}.replies.jsonl"
    records = read_jsonl(path)
    if len(records) != len(examples):
        raise FileError(f"{path}: holds {len(records)} of {len(examples)} replies; let the model answer to the end")
    answers = [(e, str(r["text"])) for e, r in zip(examples, records) if r["text"] is not None]
    if not answers:
        raise FileError(f"{path}: none of the {len(examples)} test contexts fits into the model's window")
    return answers


def answered_models(folder: Path) -> list[str]:
    """The models whose replies are in an evaluation folder, in the order of ``stage_order``."""
    found = (path.name.removesuffix(".replies.jsonl") for path in folder.glob("*.replies.jsonl"))
    names = sorted(found, key=stage_order)
    if not names:
        raise FileError(f"{folder}: holds no replies of a model (*.replies.jsonl); is this a run folder's eval?")
    return names


def stage_order(name: str) -> tuple[bool, int, str]:
    """A sort key: vanilla, M0, M1, .. M10, then other names."""
    known = name == VANILLA or is_stage(name)
    return (not known, int(name[1:]) if is_stage(name) else -1, name)
