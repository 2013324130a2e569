"""General abilities before and after training (the paper's Table 4), by lm-evaluation-harness.

    python examples/abilities.py RUN [RUN ...] [--tasks gsm8k ifeval ...] [--limit N]

Measures the vanilla backbone and every model of each run (the backbone once), and puts the table into RUN/abilities.md
and the first run's report. The paper's rows are those of a run and of the SFT-ESConv run of "ablate.py baselines". Each
model is written as an ordinary checkpoint to a temporary folder (--scratch), since the harness loads it with
transformers; where it has a chat template, questions are asked in it. A model that was measured on a task with the same
settings is not measured again. It needs: pip install 'selfevo[abilities]'. Tasks of your own: --include-path FOLDER of
the harness's YAML files; the others are downloaded by the harness.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from program import program

from selfevo.evaluation.folder import VANILLA, is_stage, stage_names
from selfevo.evaluation.origin import first_difference
from selfevo.evaluation.report import add_table, write_report
from selfevo.evaluation.tables import markdown_table
from selfevo.evolve import BackboneSettings, load_backbone, read_settings
from selfevo.evolve.evaluate import origin_of
from selfevo.files import Fields, folder_hash, read_json, read_object, write_json, write_text
from selfevo.lora import load_adapter, merge_adapters, remove_adapters
from selfevo.models import save_pretrained

# The paper's five, and the number that the harness's leaderboards print for each.
TASKS = ("gsm8k", "ifeval", "truthfulqa_mc2", "openbookqa", "mmlu_pro")
METRICS = (
    "exact_match,strict-match", "prompt_level_strict_acc,none", "acc_norm,none", "exact_match,custom-extract",
    "acc,none", "exact_match,none",
)  # fmt: skip
Cells = dict[str, dict[str, Any]]  # task -> metric, value, stderr


@contextmanager
def checkpoint(backbone: BackboneSettings, adapter: Path | None, scratch: str | None) -> Iterator[Path]:
    """A model as a folder in Hugging Face layout, for as long as it is needed."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        model, tokenizer = load_backbone(backbone)
        remove_adapters(model)
        if adapter is not None:
            load_adapter(model, adapter)
            merge_adapters(model)
        save_pretrained(model, tokenizer, folder)
        yield Path(folder)


def has_chat_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    written = config.is_file() and read_json(config).get("chat_template")
    return bool(written) or (folder / "chat_template.jinja").is_file()


def measure(folder: Path, tasks: Sequence[str], options: argparse.Namespace) -> Cells:
    """The harness's number for each task, 0..100, with its standard error."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    chat = has_chat_template(folder)
    try:
        found = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": str(folder), "dtype": options.dtype}, tasks=list(tasks),
            num_fewshot=options.shots, limit=options.limit or None, batch_size=options.batch_size,
            device=options.device, apply_chat_template=chat, fewshot_as_multiturn=chat, log_samples=False,
            task_manager=TaskManager(include_path=options.include_path),
        )  # fmt: skip
    except KeyError as error:
        raise ValueError(f"the harness does not know {error}; give names of its tasks, or --include-path") from error
    cells: Cells = {}
    for task in tasks:
        scores = {**found.get("groups", {}), **found["results"]}.get(task, {})
        metric = next((name for name in METRICS if name in scores), None)
        if metric is None:
            raise ValueError(f"{task}: the harness gave none of {', '.join(METRICS)}, but {', '.join(scores)}")
        name, how = metric.split(",")
        spread = scores.get(f"{name}_stderr,{how}")
        cells[task] = {
            "metric": metric,
            "value": 100 * scores[metric],
            "stderr": 100 * spread if isinstance(spread, float) else None,
            "chat_template": chat,
        }
    return cells


def measure_run(run: Path, options: argparse.Namespace, known: dict[str, Cells]) -> dict[str, Cells]:
    """The cells of every model of a run, by name; ``RUN/abilities.json`` keeps them with what they were measured with.
    ``known`` has those of the vanilla backbones of earlier runs, by their content."""
    path, backbone = run / "abilities.json", read_settings(run, BackboneSettings)
    settings = {"limit": options.limit, "shots": options.shots, "dtype": options.dtype}
    models = read_cells(path, settings)
    stages = [name for name in stage_names(run) if is_stage(name) and (run / name / "adapter_config.json").is_file()]
    origins = {name: origin_of(backbone, None if name == VANILLA else run / name) for name in (VANILLA, *stages)}
    tasks = {"lm_eval": version("lm_eval"), "include_sha256": tasks_hash(options.include_path)}
    content = f"{origins[VANILLA]['backbone_sha256']} {backbone.chat_format}"
    models.setdefault(VANILLA, {}).update(known.get(content, {}))
    for name, origin in origins.items():
        made_from = {key: value for key, value in origin.items() if key not in ("model", "dtype")} | tasks
        cells = models.setdefault(name, {})
        for task in options.tasks:  # versions before noted no origin
            if difference := first_difference(made_from | cells.get(task, {}).get("origin", {}), made_from):
                raise ValueError(f"{path}: {name} was measured on {task} otherwise ({difference}); remove it to go on")
        missing = [task for task in options.tasks if task not in cells]
        if missing:
            print(f"{run}: {name} on {', '.join(missing)}", flush=True)
            with checkpoint(backbone, None if name == VANILLA else run / name, options.scratch) as folder:
                found = measure(folder, missing, options)
            cells.update({task: cell | {"origin": made_from} for task, cell in found.items()})
            write_json(path, {"settings": settings, "models": models})
    known[content] = models[VANILLA]
    return {name: {task: models[name][task] for task in options.tasks} for name in origins}


def read_cells(path: Path, settings: dict[str, Any]) -> dict[str, Cells]:
    """What ``abilities.json`` has of each model, checked; nothing where there is no such file. Raises ValueError where
    it was measured with other settings."""
    if not path.exists():
        return {}
    stored = read_object(path)
    if difference := first_difference(stored.take("settings", dict), settings):
        raise ValueError(f"{path}: was measured otherwise ({difference}); remove it to measure with other settings")
    models = Fields(stored.take("models", dict), f"{path}, 'models'")
    for name in models.values:
        for task, value in models.take(name, dict).items():
            cell = Fields(value, f"{path}, {name} on {task}")
            cell.take("value", float)
            cell.take("stderr", float, None)
            cell.take("origin", dict, {})
    return models.values


def tasks_hash(folder: str | None) -> str:
    """The content of the tasks of one's own."""
    return folder_hash(Path(folder), ("**/*.yaml", "**/*.py")) if folder else ""


def labels(runs: Sequence[Path]) -> list[str]:
    """What each run after the first is called before its models' names: its folder's name where that tells them
    apart."""
    names = [run.resolve().name for run in runs]
    return ["", *(f"{name if names.count(name) == 1 else run} " for name, run in zip(names[1:], runs[1:]))]


def table(rows: dict[str, Cells], tasks: Sequence[str]) -> str:
    """Markdown: a row per model, each task's number with its standard error, and the mean over the tasks."""
    shown = {}
    for name, cells in rows.items():
        values = [f"{c['value']:.2f}" + (f" ± {c['stderr']:.2f}" if c["stderr"] else "") for c in cells.values()]
        shown[name] = [*values, f"{fmean(cell['value'] for cell in cells.values()):.2f}"]
    return markdown_table(["model", *tasks, "mean"], shown)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder of examples/iterate.py")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--include-path", metavar="FOLDER", help="tasks of your own, in the harness's YAML")
    parser.add_argument("--limit", type=int, default=0, help="questions of each task; 0 takes all (default: 0)")
    parser.add_argument("--shots", type=int, help="examples before each question (default: the task's own)")
    parser.add_argument("--batch-size", default="auto", metavar="N", help="of the harness (default: auto)")
    parser.add_argument("--device", help="of the harness (default: its own choice)")
    parser.add_argument("--dtype", default="auto", help="of the weights in the harness (default: auto)")
    parser.add_argument("--scratch", metavar="FOLDER", help="for a checkpoint at a time (default: the system's)")
    return parser.parse_args()


@program(memory="lower --batch-size", interrupted="the same command continues")
def main() -> int:
    options = parse()
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError("this needs lm-evaluation-harness: pip install 'selfevo[abilities]'") from error
    for flag, given in (("RUN", [run.resolve() for run in options.runs]), ("--tasks", options.tasks)):
        if len(set(given)) < len(given):
            raise ValueError(f"{flag}: one is given twice; give each once")
    if options.limit < 0 or (options.shots or 0) < 0:
        raise ValueError("--limit and --shots are numbers of questions, 0 or more")
    known: dict[str, Cells] = {}
    rows: dict[str, Cells] = {}
    for run, prefix in zip(options.runs, labels(options.runs)):
        for name, cells in measure_run(run, options, known).items():
            if name != VANILLA or cells != rows.get(VANILLA):  # a backbone that runs share is one row
                rows[prefix + name] = cells
    text, run = table(rows, options.tasks), options.runs[0]
    write_text(run / "abilities.md", text + "\n")
    values = {name: {task: cell["value"] for task, cell in cells.items()} for name, cells in rows.items()}
    add_table(run / "eval", "abilities", "General abilities (lm-evaluation-harness), %.", values, digits=2)
    report = write_report(run)
    print(f"\n{text}\n\nalso in {run / 'abilities.md'} and {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
