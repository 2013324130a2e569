"""Talk to trained models in the terminal, or let several of them answer the same words (the paper's Figures 7 to 10).

    python examples/chat.py RUN                                      the last model of a run
    python examples/chat.py RUN --models vanilla M0 M2               several of it, each with a conversation of its own
    python examples/chat.py RUN --script FILE --models M0 M2         the user's words from a file, a line each; the
                                                                     answers are also kept in RUN/chats/FILE.md
    python examples/chat.py --backbone Qwen/Qwen2-7B-Instruct        a bare backbone

RUN is a run of iterate.py (models vanilla, M0, M1, ...) or of decoupled.py (joint-sft, decoupled-sft, decoupled-dpo;
the strategy is shown). An empty line or the end of input ends the conversation. --reflect also shows what the model
thinks about its own reply, and how it would rewrite it: the step that training turns into its first answer. A
conversation longer than the model's window loses its oldest turns. This is a research model, no counsellor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from program import program, refuse_idle

from selfevo.datasets.encoding import fit_prompt
from selfevo.datasets.prompts import reply_prompt
from selfevo.decoupled import DecoupledConfig
from selfevo.decoupled.planner import (
    generator_prompt,
    joint_prompt,
    planner_prompt,
    read_joint,
    score_plans,
)
from selfevo.dialogue import Message, Turn, to_messages
from selfevo.evaluation.folder import VANILLA, stage_names
from selfevo.evolve import BackboneSettings, DataSettings, EvolveConfig, RunError, load_backbone, read_settings
from selfevo.evolve.reflection import GUIDED, answer_form, parse_reflection, reflection_prompt
from selfevo.evolve.settings import change
from selfevo.files import read_text, write_text
from selfevo.generate import generate
from selfevo.generate.form import Form
from selfevo.generate.replies import ReplySettings
from selfevo.lora import load_adapter, remove_adapters
from selfevo.models import ChatTokenizer, Transformer

Answer = tuple[Turn, list[str]]  # the supporter's turn, and what is shown beside it


@dataclass
class Speaker:
    """A backbone that adapters are put on, and how its words are drawn."""

    model: Transformer
    tokenizer: ChatTokenizer
    replies: ReplySettings

    def wear(self, adapter: Path | None) -> None:
        """Puts exactly this adapter on the backbone."""
        remove_adapters(self.model)
        if adapter is not None:
            load_adapter(self.model, adapter)

    def write(
        self, prompt: list[Message], tokens: int, keep: int = 1, form: Callable[[int], Form] | None = None
    ) -> str:
        """One sampled continuation; the number of messages is its key, so that turns draw differently."""
        room = min(tokens, self.model.config.max_positions // 4)
        fitted = fit_prompt(self.tokenizer, prompt, self.model.config.max_positions - room, keep_last=keep)
        if fitted.ids is None:
            raise RunError("what you said is longer than the model's window; say less at once")
        (ids,) = generate(
            self.model, [fitted.ids], max_new_tokens=room, stop_ids=self.tokenizer.stop_ids, keys=[len(prompt)],
            form=None if form is None else form(room), **vars(self.replies.sampling),
        )  # fmt: skip
        return self.tokenizer.decode(ids).strip()


def support(speaker: Speaker, config: EvolveConfig, adapter: Path | None, reflects: bool) -> Callable[..., Answer]:
    """How a model of the loop answers a conversation."""
    settings = config.replies

    def answer(spoken: list[Turn]) -> Answer:
        speaker.wear(adapter)
        prompt = reply_prompt(to_messages(spoken), settings.prompts.system)
        reply = speaker.write(prompt, settings.max_new_tokens)
        if not reflects:
            return Turn("supporter", reply), []
        request = reflection_prompt(prompt, reply, settings.prompts.refine)
        form = None
        if settings.reflection == GUIDED:
            form = answer_form(speaker.model, speaker.tokenizer, settings.prompts.refine)
        thought = parse_reflection(speaker.write(request, settings.reflection_tokens, 3, form))
        if thought is None:
            return Turn("supporter", reply), ["(the reflection cannot be read)"]
        notes = [f"{aspect}: {understood}" for aspect, understood in thought.understanding.items()]
        notes += [f"score {thought.score or '-'}: {thought.feedback}", f"rewritten: {thought.refined}"]
        return Turn("supporter", reply), notes

    return answer


def decoupled(speaker: Speaker, run: Path, name: str) -> Callable[..., Answer]:
    """How a system of Decoupled ESC answers: by one joint model, or by a planner and then a generator."""

    def answer(spoken: list[Turn]) -> Answer:
        if name == "joint-sft":
            speaker.wear(run / name)
            found, reply = read_joint(speaker.write(joint_prompt(spoken), speaker.replies.max_new_tokens))
        else:
            stage = name.removeprefix("decoupled-")
            speaker.wear(run / f"planner-{stage}")
            (plan,) = score_plans(speaker.model, speaker.tokenizer, [planner_prompt(spoken)], label="")
            if plan is None:
                raise RunError("what you said is longer than the model's window; say less at once")
            speaker.wear(run / f"generator-{stage}")
            found = plan
            reply = speaker.write(generator_prompt(spoken, plan.known), speaker.replies.max_new_tokens)
        return Turn("supporter", reply, (found.known,)), [f"strategy: {found.known}"]

    return answer


def open_models(options: argparse.Namespace) -> dict[str, Callable[..., Answer]]:
    """The models that were asked for, by name, on one backbone."""
    run = Path(options.run) if options.run else None
    if run is None and not options.backbone:
        raise RunError("give a run folder, or --backbone")
    if options.models and len(set(options.models)) < len(options.models):
        raise RunError("--models: a name is given twice; give each once")
    stages = stage_names(run) if run else []
    stages = [stage for stage in stages if run and (run / stage / "adapter_config.json").is_file()]
    config: EvolveConfig | DecoupledConfig
    if run is None:
        config, known = EvolveConfig(backbone=BackboneSettings(""), data=DataSettings(""), out=""), [VANILLA]
    elif "joint-sft" in stages:
        config = read_settings(run, DecoupledConfig)
        systems = {"joint-sft": ["joint-sft"]}
        systems |= {f"decoupled-{kind}": [f"planner-{kind}", f"generator-{kind}"] for kind in ("sft", "dpo")}
        known = [name for name, parts in systems.items() if set(parts) <= set(stages)]
    else:
        config, known = read_settings(run, EvolveConfig), [VANILLA, *stages]
    names = options.models or known[-1:]
    if unknown := [name for name in names if name not in known]:
        raise RunError(f"{run or options.backbone}: has no model {', '.join(unknown)}; it has {', '.join(known)}")
    if isinstance(config, DecoupledConfig):
        refuse_idle(["--reflect"], "models of Decoupled ESC do not reflect")
    if config.replies.sampling.temperature == 0:
        refuse_idle(["--seed"], "at temperature 0 nothing is drawn")
    if options.backbone:
        config = change(config, backbone=options.backbone)
    model, tokenizer = load_backbone(config.backbone)
    speaker = Speaker(model, tokenizer, config.replies.seeded(options.seed, "chat"))
    if isinstance(config, DecoupledConfig):
        assert run is not None
        return {name: decoupled(speaker, run, name) for name in names}
    adapters = {name: run / name if run and name != VANILLA else None for name in names}
    return {name: support(speaker, config, adapter, options.reflect) for name, adapter in adapters.items()}


def read_lines(script: str | None) -> Iterator[str]:
    """What the user says: the lines of a file that are not blank, or what is typed until a blank line."""
    if script is None:
        while said := input("you: ").strip():
            yield said
        return
    lines = [line.strip() for line in read_text(script).splitlines() if line.strip()]
    if not lines:
        raise RunError(f"{script}: is empty; give a file with a line for each turn")
    for line in lines:
        print(f"you: {line}")
        yield line


def talk(models: Mapping[str, Callable[..., Answer]], lines: Iterator[str]) -> Iterator[str]:
    """Lets every model answer each of the user's lines in its own conversation; yields the Markdown of each round."""
    spoken: dict[str, list[Turn]] = {name: [] for name in models}
    for said in lines:
        shown = [f"**user:** {said}"]
        for name, answer in models.items():
            spoken[name].append(Turn("seeker", said))
            turn, notes = answer(spoken[name])
            spoken[name].append(turn)
            print(f"{name}: {turn.text}", *(f"  {note}" for note in notes), sep="\n")
            shown.append("\n".join([f"**{name}:** {turn.text}", *(f"- {note}" for note in notes)]))
        yield "\n\n".join(shown)


@program(memory="take a smaller backbone")
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="run folder of examples/iterate.py or decoupled.py")
    parser.add_argument("--models", "--model", nargs="+", metavar="NAME", help="default: the last of the run")
    parser.add_argument("--backbone", help="folder or hub id (default: the run's)")
    parser.add_argument("--reflect", action="store_true", help="show the model's reflection on each reply")
    parser.add_argument("--script", metavar="FILE", help="what the user says, a line each, instead of the terminal")
    parser.add_argument("--save", metavar="FILE", help="keep the conversation as Markdown (default: only a script's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    options = parser.parse_args()
    path = options.save
    if path is None and options.script and options.run:
        path = Path(options.run) / "chats" / f"{Path(options.script).stem}.md"
    kept: list[str] = []
    try:
        lines = read_lines(options.script)
        if options.script:
            lines = iter([*lines])  # a script that cannot be used is told before a model is loaded
        models = open_models(options)
        said_by = f"{', '.join(models)} of {options.run or options.backbone}, seed {options.seed}"
        for part in talk(models, lines):
            kept.append(part)
            if path is not None:
                write_text(path, "\n\n---\n\n".join([said_by, *kept]) + "\n")
    except (EOFError, KeyboardInterrupt):
        print()
    if path is not None and kept:
        print(f"kept in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
