"""Judgements on disk: every judge, with its parameters, criteria and test turns, has a folder of its own.

``judged/JUDGE-HASH`` in an evaluation folder holds ``request.json`` (all that scores depend on besides the
replies), and for every model ``NAME.json`` (means, what failed) and ``NAME.jsonl`` (single scores and reasons). Version
0.1 kept ``NAME.judge.json`` beside the replies, whoever the judge was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfevo.evaluation.ask_json import request_hash
from selfevo.evaluation.folder import stage_order
from selfevo.evaluation.judge import Aspect, Judgement
from selfevo.files import Fields, file_hash, read_object, write_json, write_jsonl

JUDGED = "judged"
OLD = ".judge.json"
_UNFIT = re.compile(r"[^\w.-]+")


def judging_folder(folder: Path, request: Mapping[str, Any]) -> Path:
    """Where the judgements of one request are kept, made with its ``request.json`` where it is not there yet.

    The request has "judge", its name, and everything else that is the same for all replies that it judges.
    """
    name = _UNFIT.sub("-", Path(request["judge"]).name)[:40].strip(".-") or "judge"
    path = folder / JUDGED / f"{name}-{request_hash(dict(request))[:8]}"
    if not (path / "request.json").is_file():
        write_json(path / "request.json", request)
    return path


def describe_aspects(aspects: Sequence[Aspect]) -> dict[str, str]:
    """The hash of the criteria of each aspect, by name."""
    return {a.name: request_hash({"q": a.question, "levels": dict(a.levels), "caps": list(a.caps)}) for a in aspects}


def write_judgements(
    judging: Path, name: str, turns: Sequence[tuple[str, str]], judged: Sequence[Judgement], summary: Mapping[str, Any]
) -> None:
    """Keeps the judgements of one model's replies; ``turns`` has the id and the dialogue of each."""
    records = [
        {"id": id_, "dialogue": dialogue, "scores": one.scores or None, "reasons": one.reasons or None}
        for (id_, dialogue), one in zip(turns, judged, strict=True)
    ]
    write_jsonl(judging / f"{name}.jsonl", records)
    replies = judging.parents[1] / f"{name}.replies.jsonl"
    report = {"model": name, "replies": len(records), "replies_sha256": file_hash(replies)}
    write_json(judging / f"{name}.json", report | dict(summary))


def read_judgings(folder: Path) -> list[dict[str, Any]]:
    """What the judges of an evaluation folder said, a dict for each: ``judge`` (its name and how it was asked),
    ``aspects``, ``reports`` by model. Raises FileError for a file that does not hold judgements of today's replies."""
    found: dict[str, dict[str, Any]] = {}
    for judging in sorted((folder / JUDGED).glob("*")):
        request = read_object(path := judging / "request.json")
        judge = request.take("judge", str)
        details = [f"{k.replace('_', ' ')} {v}" for k, v in request.values.items() if k in _SHOWN and v is not None]
        paths = [file for file in path.parent.glob("*.json") if file != path]
        _add(found, path.parent.name, f"{judge} ({', '.join(details)})", {file.stem: file for file in paths})
    older = sorted(folder.glob(f"*{OLD}"))
    for path in older:
        judge = read_object(path).take("judge", str)
        _add(found, f"0.1 {judge}", judge, {path.name.removesuffix(OLD): path})
    return list(found.values())


_SHOWN = ("url", "temperature", "top_p", "top_k", "max_tokens", "joint", "contexts", "seed")


def _add(found: dict[str, dict[str, Any]], key: str, judge: str, paths: Mapping[str, Path]) -> None:
    for name in sorted(paths, key=stage_order):
        report = read_judge_report(paths[name])
        one = found.setdefault(key, {"judge": judge, "aspects": [], "reports": {}})
        one["reports"][name] = report
        one["aspects"] += [aspect for aspect in report["scores"] if aspect not in one["aspects"]]


def read_judge_report(path: Path) -> dict[str, Any]:
    """A model's report, checked: how many replies were answered, what failed, and the mean of each aspect."""
    fields = read_object(path)
    fields.take("answered", int, low=0)
    for kind in ("failures", "mended"):
        counts = Fields(fields.take(kind, dict, {}), f"{path}, {kind!r}")
        fields.values[kind] = {reason: counts.take(reason, int, 0) for reason in counts.values}
    for aspect, value in fields.take("scores", dict).items():
        score = Fields(value, f"{path}, score {aspect!r}")
        score.take("mean", float)
        if len(score.take_list("interval", float)) != 2:
            raise score.fail("'interval' should be its two ends")
    digest = fields.take("replies_sha256", str, None)
    replies = path.parents[2] / f"{path.stem}.replies.jsonl"
    if digest is not None and digest != file_hash(replies):
        raise fields.fail(f"judges other replies than {replies} holds today; remove it, or judge again")
    return fields.values
