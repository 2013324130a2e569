"""Talk to a trained model in the terminal.

    python examples/chat.py RUN                                    the last model of a run
    python examples/chat.py RUN --model M0                         another one of it
    python examples/chat.py --backbone Qwen/Qwen2-7B-Instruct      a bare backbone

An empty line or the end of input ends the conversation. --reflect also shows what the model thinks about its own reply,
and how it would rewrite it: the step that training turns into its first answer. A conversation longer than the model's
window loses its oldest turns. This is a research model, no counsellor.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from selfevo.datasets.encoding import fit_prompt
from selfevo.datasets.prompts import reply_prompt
from selfevo.evolve import BackboneSettings, DataSettings, EvolveConfig, RunError, load_backbone, read_settings
from selfevo.evolve.refine import RefineSettings
from selfevo.evolve.reflection import parse_reflection, reflection_prompt
from selfevo.evolve.settings import change
from selfevo.generate import generate
from selfevo.lora import load_adapter
from selfevo.models import ChatTokenizer, Transformer

Messages = list[dict[str, str]]


def open_model(run: str | None, name: str | None, backbone: str | None) -> tuple[EvolveConfig, str | None]:
    """The settings to load and to sample with, and the adapter's folder."""
    if run is None:
        if backbone is None:
            raise RunError("give a run folder, or --backbone")
        return EvolveConfig(backbone=BackboneSettings(backbone), data=DataSettings(""), out=""), None
    config = read_settings(Path(run), EvolveConfig)
    done = [name for name in config.models if (Path(run) / name / "adapter_config.json").is_file()]
    if not done or name not in (None, *done):
        raise RunError(f"{run}: has no model {name or 'yet'}; it has {', '.join(done) or 'none'}")
    return config if backbone is None else change(config, backbone=backbone), str(Path(run) / (name or done[-1]))


def answer(
    model: Transformer, tokenizer: ChatTokenizer, messages: Messages, settings: RefineSettings, tokens: int, keep: int
) -> str:
    """One sampled continuation of a conversation; the number of turns is its key, so that turns draw differently."""
    room = min(tokens, model.config.max_positions // 4)
    prompt = fit_prompt(tokenizer, messages, model.config.max_positions - room, keep_last=keep)
    if prompt.ids is None:
        raise RunError("what you said is longer than the model's window; say less at once")
    (ids,) = generate(
        model, [prompt.ids], max_new_tokens=room, stop_ids=tokenizer.stop_ids, keys=[len(messages)],
        **vars(settings.sampling),
    )  # fmt: skip
    return tokenizer.decode(ids).strip()


def talk(model: Transformer, tokenizer: ChatTokenizer, settings: RefineSettings, reflect: bool) -> None:
    spoken: Messages = []
    while said := input("you: ").strip():
        spoken.append({"role": "user", "content": said})
        prompt = reply_prompt(spoken, settings.prompts.system)
        reply = answer(model, tokenizer, prompt, settings, settings.max_new_tokens, 1)
        print(f"model: {reply}")
        spoken.append({"role": "assistant", "content": reply})
        if not reflect:
            continue
        text = answer(model, tokenizer, reflection_prompt(prompt, reply, settings.prompts.refine), settings,
            settings.reflection_tokens, 3)  # fmt: skip
        thought = parse_reflection(text)
        if thought is None:
            print("  (the reflection cannot be read)")
            continue
        for aspect, understood in thought.understanding.items():
            print(f"  {aspect}: {understood}")
        print(f"  score {thought.score or '-'}: {thought.feedback}\n  rewritten: {thought.refined}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="run folder of examples/iterate.py")
    parser.add_argument("--model", metavar="NAME", help="M0, M1, ... (default: the last of the run)")
    parser.add_argument("--backbone", help="folder or hub id (default: the run's)")
    parser.add_argument("--reflect", action="store_true", help="show the model's reflection on each reply")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    options = parser.parse_args()
    try:
        config, adapter = open_model(options.run, options.model, options.backbone)
        model, tokenizer = load_backbone(config.backbone)
        if adapter is not None:
            load_adapter(model, adapter)
        talk(model, tokenizer, config.replies.seeded(options.seed, "chat"), options.reflect)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (EOFError, KeyboardInterrupt):
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
