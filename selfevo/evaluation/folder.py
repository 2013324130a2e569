"""The layout of an evaluation folder and of a run folder: test turns, replies, stages."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from selfevo.dialogue import Example, Speaker, Turn, to_messages
from selfevo.files import Fields, FileError, read_jsonl, read_object, write_jsonl

VANILLA = "vanilla"  # the name of the backbone without any adapter
# The stages of Decoupled ESC, in the order in which they are trained.
DECOUPLED_STAGES = ("planner-sft", "generator-sft", "joint-sft", "planner-dpo", "generator-dpo")
EXAMPLES = "examples.jsonl"
_HELD_OUT = {"held_out", "held_out_before"}
_PREFERENCE = {"dpo", "sft", "accuracy", "chosen_reward", "rejected_reward", "chosen_logp_per_token",
               "rejected_logp_per_token"}  # fmt: skip
_STAGE = re.compile(r"M(0|[1-9]\d*)")
_NAME = re.compile(r"\w(?:[\w .+-]*[\w+-])?")  # names become names of files and cells of tables
_LONGEST_NAME = 100  # bytes
_OWN_FILES = {"scores", "tables", "examples", "golden", "judge", "judged", "judge-cache"}
_OWN_SUFFIXES = {"judge", "request", "values", "replies", "plans", "written", "support", "strategies", "paper",
                 "characters", "esconv", "decoupledesc", "json", "jsonl", "md"}  # fmt: skip


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
    settings = read_object(run / "config.json").take("settings", dict)
    guided = settings.get("reflection") == "guided"
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
        records = read_steps(path) if path.exists() else []
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


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The steps of a stage's ``metrics.jsonl``, checked: numbers, the same ones in every step, and some of them again
    where held-out items were evaluated. A diverged stage has some that are not finite."""
    steps: list[dict[str, Any]] = []
    for index, record in enumerate(read_jsonl(path)):
        fields = Fields(record, f"{path}, record {index}")
        numbers = {key: value for key, value in fields.values.items() if key not in _HELD_OUT}
        shown = _PREFERENCE | {"loss"} if "dpo" in numbers else {"loss"}
        parts = [(numbers, steps[0].keys() - _HELD_OUT if steps else shown | {"step", "seconds"})]
        parts += [(fields.take(key, dict), shown) for key in _HELD_OUT if key in fields.values]
        for own, needed in parts:
            if bad := [key for key, value in own.items() if type(value) not in (int, float)]:
                raise fields.fail(f"{bad[0]!r} should be a number, not {reprlib.repr(own[bad[0]])}")
            if lacking := sorted(needed - own.keys()):
                raise fields.fail(f"{lacking[0]!r} is missing; is the file cut or changed?")
        if fields.take("step", int, low=0) <= (steps[-1]["step"] if steps else -1):
            raise fields.fail("is a step again; is the file of two runs?")
        steps.append(fields.values)
    return steps


def used_reflections(stage: Path) -> tuple[int, int]:
    """Of how many of its replies' reflections a stage could use, and how many replies it could reflect on."""
    counts = read_counts(stage / "filter.json")
    total = counts["examples"] - counts["reply_prompt_too_long_dropped"] - counts["empty_reply_dropped"]
    return total - counts["golden_for_missing_reflection"], total


def read_counts(path: Path) -> Counter[str]:
    """The counts of a file such as ``filter.json``, an object of integers; none where there is no such file."""
    if not path.exists():
        return Counter()
    fields = read_object(path)
    return Counter({key: fields.take(key, int) for key in fields.values})


def check_name(name: str) -> None:
    """Raises ValueError for what cannot name a model's files in an evaluation folder and its row of a table."""
    suffix = name.rpartition(".")[2] if "." in name else ""
    if not _NAME.fullmatch(name) or len(name.encode()) > _LONGEST_NAME:
        raise ValueError(
            "a model's name may have letters, digits, spaces inside and . _ + -, begins with a letter or digit and is "
            f"not long, {reprlib.repr(name)} is not such a name"
        )
    if name.casefold() in _OWN_FILES or suffix.casefold() in _OWN_SUFFIXES:
        raise ValueError(f"{name!r} cannot name a model: the evaluation folder has files of that name; take another")


def reply_records(path: Path) -> list[Fields]:
    """The records of a ``NAME.replies.jsonl``, checked; "text" is None where the prompt did not fit."""
    found = []
    for index, record in enumerate(read_jsonl(path)):
        fields = Fields(record, f"{path}, record {index}")
        if "text" not in fields.values:
            raise fields.fail("holds no reply (there is no 'text'); is the file one of this library?")
        fields.take("text", str, None)
        fields.take("turns_dropped", int, 0, low=0)
        if fields.take("index", int, index) != index:
            raise fields.fail("is out of order; remove the file, and let the model answer again")
        found.append(fields)
    return found


def read_replies(path: Path) -> list[str | None]:
    """The texts of a ``NAME.replies.jsonl``, in the order of the test turns; None where the prompt did not fit."""
    return [fields.values["text"] for fields in reply_records(path)]


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """Keeps the test turns in ``folder``; raises FileError where it holds answers to other ones."""
    check_examples(folder, examples)
    path = folder / EXAMPLES
    if not path.is_file():
        write_jsonl(path, [_record(example) for example in examples])


def check_examples(folder: Path, examples: Sequence[Example]) -> None:
    """Raises FileError where a folder holds other test turns, to which its models have answered."""
    path = folder / EXAMPLES
    if path.is_file() and read_jsonl(path) != [_record(example) for example in examples]:
        raise FileError(f"{path}: holds other test turns; give another folder, or the same test file and limit")


def _record(example: Example) -> dict[str, Any]:
    return {
        "id": example.id,
        "dialogue": example.dialogue,
        "turn": example.turn,
        "context": to_messages(example.context),
        "golden": example.golden.text,
        "strategies": list(example.golden.strategies),
    }


def read_examples(folder: Path) -> list[Example]:
    """The test turns of an evaluation folder, at least one. Raises FileError for what is none and for two of one id."""
    path = folder / EXAMPLES
    examples: dict[str, Example] = {}
    for index, record in enumerate(read_jsonl(path)):
        fields = Fields(record, f"{path}, record {index}")
        context = []
        for message in fields.take_list("context", dict):
            said = Fields(message, f"{fields.where}, context")
            speaker: Speaker = "seeker" if said.take("role", str) == "user" else "supporter"
            context.append(Turn(speaker, said.take("content", str)))
        if not context:
            raise fields.fail("'context' should hold what was said before")
        golden = Turn("supporter", fields.take("golden", str), tuple(fields.take_list("strategies", str, [])))
        example = Example(fields.take("dialogue", str), fields.take("turn", int, low=0), tuple(context), golden)
        if example.id in examples:
            raise fields.fail(f"is a second test turn {example.id!r}; mend the file, or give another folder")
        examples[example.id] = example
    if not examples:
        raise FileError(f"{path}: holds no test turns; remove it, and give the test dialogues again")
    return list(examples.values())


def read_answers(folder: Path, name: str) -> list[tuple[Example, str]]:
    """The test turns that a model answered, with its replies; those that did not fit into its window are left out."""
    examples, path = read_examples(folder), folder / f"{name}.replies.jsonl"
    replies = read_replies(path)
    if len(replies) != len(examples):
        raise FileError(f"{path}: holds {len(replies)} of {len(examples)} replies; let the model answer to the end")
    answers = [(example, text) for example, text in zip(examples, replies) if text is not None]
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
