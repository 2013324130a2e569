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
from pathlib import Path
from statistics import fmean
from typing import Any

from program import program

from selfevo.evaluation.folder import VANILLA, is_stage, stage_names
from selfevo.evaluation.report import add_table, write_report
from selfevo.evaluation.tables import markdown_table
from selfevo.evolve import BackboneSettings, load_backbone, read_settings
from selfevo.files import read_json, write_json, write_text
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
    """The cells of every model of a run, by name; ``RUN/abilities.json`` keeps them. ``known`` has those of the vanilla
    backbones of earlier runs, by their source."""
    path, backbone = run / "abilities.json", read_settings(run, BackboneSettings)
    settings = {"limit": options.limit, "shots": options.shots, "dtype": options.dtype}
    stored = read_json(path) if path.is_file() else {"settings": settings, "models": {}}
    if stored["settings"] != settings:
        raise ValueError(f"{path}: was measured with {stored['settings']}; remove it to measure with other settings")
    models: dict[str, Cells] = stored["models"]
    models.setdefault(VANILLA, {}).update(known.get(backbone.source, {}))
    stages = [name for name in stage_names(run) if is_stage(name) and (run / name / "adapter_config.json").is_file()]
    for name in (VANILLA, *stages):
        missing = [task for task in options.tasks if task not in models.setdefault(name, {})]
        if missing:
            print(f"{run}: {name} on {', '.join(missing)}", flush=True)
            adapter = None if name == VANILLA else run / name
            with checkpoint(backbone, adapter, options.scratch) as folder:
                models[name].update(measure(folder, missing, options))
            write_json(path, stored)
    known[backbone.source] = models[VANILLA]
    return {name: {task: models[name][task] for task in options.tasks} for name in (VANILLA, *stages)}


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
    known: dict[str, Cells] = {}
    rows: dict[str, Cells] = {}
    for run in options.runs:
        prefix = "" if run == options.runs[0] else f"{run.name} "
        for name, cells in measure_run(run, options, known).items():
            if name != VANILLA or name not in rows:
                rows[name if name == VANILLA else prefix + name] = cells
    text, run = table(rows, options.tasks), options.runs[0]
    write_text(run / "abilities.md", text + "\n")
    values = {name: {task: cell["value"] for task, cell in cells.items()} for name, cells in rows.items()}
    add_table(run / "eval", "abilities", "General abilities (lm-evaluation-harness), %.", values, digits=2)
    report = write_report(run)
    print(f"\n{text}\n\nalso in {run / 'abilities.md'} and {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
