"""Preference pairs from self-reflection: reply (rejected), reflect and refine (chosen), then the paper's data rules.

Section 3.3 and Appendix A: a reflection is requested as JSON up to three times, then the golden reply stands in;
a refined reply more than twice as long as the rejected or the golden one gives way to the golden one. Every rule
counts its cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from selfevo.datasets.pairs import Pair, read_pairs
from selfevo.datasets.prompts import REPLY_STYLES, Prompts, prompts_of, reply_prompt
from selfevo.datasets.seeds import derive_seed
from selfevo.dialogue import Example, Message, to_messages
from selfevo.evaluation.ask_json import ask_again
from selfevo.evolve.json_repair import json_object_end
from selfevo.evolve.reflection import (
    FREE,
    GUIDED,
    REFINED,
    WAYS,
    Reflection,
    answer_form,
    parse_reflection,
    reflection_prompt,
    whole_sentences,
)
from selfevo.files import write_json, write_jsonl
from selfevo.generate.replies import Reply, ReplySettings, reply_limit, sample_replies
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.models.transformer import Transformer

LENGTH_RATIO = 2.0  # a refined reply longer than this many times the rejected or the golden one is replaced
SOURCES = ("refined", "golden")  # where chosen replies come from: Table 5's SR, and HM or HL by the seed dialogues


@dataclass(frozen=True)
class RefineSettings(ReplySettings):
    """How replies are sampled, reflected on and refined."""

    reflection_tokens: Annotated[int, "longest reflection, in tokens"] = 384
    reflection: Annotated[
        str, "how reflections come to be JSON: free, as the model writes it, or guided, the decoder writing keys", WAYS
    ] = FREE
    tries: Annotated[int, "tries for a usable reflection before the golden reply is used"] = 3
    style: Annotated[str, "system prompt of replies", REPLY_STYLES] = "strategy"
    prompts_file: Annotated[str, "JSON object of texts that replace prompts: by style, and refine"] = ""
    chosen: Annotated[str, "where chosen replies come from: the model's refinement, or the seed dialogues", SOURCES] = (
        "refined"
    )

    def __post_init__(self) -> None:
        for name in ("reflection_tokens", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name, known in (("style", REPLY_STYLES), ("chosen", SOURCES), ("reflection", WAYS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} should be one of {', '.join(known)}, not {getattr(self, name)!r}")
        super().__post_init__()

    @property
    def prompts(self) -> Prompts:
        """The texts of the style."""
        return prompts_of(self.style, self.prompts_file)


def check_form(model: Transformer, tokenizer: ChatTokenizer, settings: RefineSettings) -> None:
    """Raises ValueError where reflections are to be in a form that does not fit into their tokens: before anything is
    trained or sampled."""
    if settings.reflection == GUIDED and settings.chosen == "refined":
        form = answer_form(model, tokenizer, settings.prompts.refine)
        form(reply_limit(model, settings.reflection_tokens))


def make_pairs(
    model: Transformer,
    tokenizer: ChatTokenizer,
    examples: Sequence[Example],
    folder: Path,
    settings: RefineSettings,
) -> list[Pair]:
    """Runs reply, reflect, refine and filter over the seed examples; everything is kept in ``folder`` as it comes.

    Writes ``replies.jsonl``, ``reflections-1.jsonl`` .. ``-3.jsonl``, ``pairs.jsonl`` and, last, ``filter.json`` with
    what each rule changed; a folder that has it is read back instead. With ``chosen`` "golden" nothing is reflected on.
    """
    if (folder / "filter.json").is_file():
        return read_pairs(folder / "pairs.jsonl")
    counts: Counter[str] = Counter(examples=len(examples))
    prompts = [reply_prompt(to_messages(example.context), settings.prompts.system) for example in examples]
    replies = sample_replies(
        model, tokenizer, prompts, folder / "replies.jsonl",
        sampling=settings.sampling, max_new_tokens=settings.max_new_tokens, slots=settings.slots, label="replies",
    )  # fmt: skip
    reflections = None
    if settings.chosen == "refined":
        reflections = reflect(model, tokenizer, prompts, replies, folder, settings, counts)
    pairs = filter_pairs(examples, prompts, replies, reflections, counts)
    write_jsonl(folder / "pairs.jsonl", [pair.as_record() for pair in pairs])
    write_json(folder / "filter.json", dict(sorted(counts.items())))
    return pairs


def reflect(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Sequence[list[Message]],
    replies: Sequence[Reply],
    folder: Path,
    settings: RefineSettings,
    counts: Counter[str],
) -> list[Reflection | None]:
    """The model's reflection on each of its replies, or None where no try gave a usable one."""
    found: list[Reflection | None] = [None] * len(prompts)
    request = settings.prompts.refine
    guided = settings.reflection == GUIDED

    def ask(indices: list[int], attempt: int) -> list[Reply]:
        return sample_replies(
            model,
            tokenizer,
            [reflection_prompt(prompts[index], replies[index].text or "", request) for index in indices],
            folder / f"reflections-{attempt}.jsonl",
            sampling=replace(settings.sampling, seed=derive_seed(settings.sampling.seed, "reflection", attempt)),
            max_new_tokens=settings.reflection_tokens,
            keep_last=3,
            stop_when=None if guided else partial(json_object_end, wanted=REFINED),
            form=answer_form(model, tokenizer, request) if guided else None,
            slots=settings.slots,
            label=f"reflections, try {attempt}",
        )

    def use(index: int, written: Reply, attempt: int) -> bool:
        if written.text is None:
            counts["reflection_prompt_too_long"] += 1
            return True  # it would not fit the next time either
        if attempt == 1 and written.turns_dropped:
            counts["reflection_context_cut"] += 1
        thought = parse_reflection(written.text)
        if guided and thought is not None and written.cut:
            counts["refinement_cut_at_limit"] += 1
            whole = whole_sentences(thought.refined)
            thought = replace(thought, refined=whole) if whole else None
        found[index] = thought
        if found[index] is None:
            counts[f"unusable_json_try_{attempt}"] += 1
        return found[index] is not None

    ask_again([index for index, reply in enumerate(replies) if reply.text], settings.tries, ask, use)
    return found


def filter_pairs(
    examples: Sequence[Example],
    prompts: Sequence[list[Message]],
    replies: Sequence[Reply],
    reflections: Sequence[Reflection | None] | None,
    counts: Counter[str],
) -> list[Pair]:
    """Chosen and rejected replies after the data rules; ``counts`` says what each rule changed.

    Without ``reflections`` every chosen reply is the golden one.
    """
    pairs = []
    thoughts = reflections or [None] * len(examples)
    for example, prompt, reply, reflection in zip(examples, prompts, replies, thoughts):
        golden = example.golden.text
        if reply.text is None:
            counts["reply_prompt_too_long_dropped"] += 1
            continue
        counts["reply_context_cut"] += bool(reply.turns_dropped)
        counts["reply_cut_at_limit"] += reply.cut
        if not reply.text:
            counts["empty_reply_dropped"] += 1
            continue
        chosen, source = golden, "golden"
        if reflection is None:
            counts["golden_for_missing_reflection"] += reflections is not None
        elif _words(reflection.refined) > LENGTH_RATIO * min(_words(reply.text), _words(golden)):
            counts["golden_for_too_long_refinement"] += 1
        else:
            chosen, source = reflection.refined, "refined"
        if chosen.strip() == reply.text.strip():
            counts["identical_dropped"] += 1
            continue
        counts[f"kept_{source}"] += 1
        thought = None if reflection is None else asdict(reflection)
        pairs.append(Pair(example.id, example.dialogue, prompt, chosen, reply.text, golden, source, thought, reply.cut))
    counts["pairs"] = len(pairs)
    return pairs


def _words(text: str) -> int:
    return len(text.split())
