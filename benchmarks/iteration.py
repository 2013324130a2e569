"""One whole iteration on real dialogues: this library against transformers' ``generate`` + TRL's DPOTrainer with PEFT.

    python benchmarks/iteration.py --data ESConv.json --backbone CHECKPOINT
    python benchmarks/iteration.py --data ESConv.json --tokenizer CHECKPOINT --shape smollm2-135m    # random weights

Five stages, as in an iteration of the loop: a reply for every supporter turn of a few whole dialogues, a reflection on
every reply, the reference's log-probabilities of the pairs, DPO + gamma * SFT in steps of 8 pairs, and an answer to
every supporter turn of as many other dialogues. Both sides have the same weights, prompts and pairs. So that work does
not depend on what is sampled, every reply has exactly ``--new`` tokens and every reflection ``--reflection-new``, and
golden replies stand for sampled ones where one stage hands them to the next.

We run the library's own functions over all turns, the frozen adapter of the iteration before included. The others do
``--sample`` turns of every stage, evenly by length, and each stage's time is scaled to all turns. They get what is best
for them: batches in order of length, adapters merged into the weights while sampling, stored log-probabilities of the
reference, the fused output head of TRL, no activation checkpointing, and of the batch sizes given (and of continuous
batching with ``--continuous``) whichever is the fastest in a trial beforehand. Rounds alternate; one over a single turn
goes before and is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from contest import GIB, Contender, Result, Work, compete, spread
from rollout import SAMPLING, transformers_sample
from shapes import SHAPES, TurnPair, dialogue_turns, evenly, write_random
from train import ALPHA, BETA, GAMMA, RANK, RATE, device_and_dtype, dpo_rows, dpo_trainer

from selfevo.datasets.prompts import prompts_of
from selfevo.evolve.reflection import reflection_prompt
from selfevo.generate import generate
from selfevo.lora import freeze_adapter, inject_lora
from selfevo.models import ChatTokenizer, load_model, load_tokenizer
from selfevo.training import DPOObjective, PairIds, TrainSettings, keep_freed_memory, reference_logps, train

T = TypeVar("T")
STAGES = ("replies", "reflections", "reference", "training", "answers")
STEP = TrainSettings.batch_size * TrainSettings.accumulation  # pairs


@dataclass(frozen=True)
class Job:
    """Prompts (ids) of the three stages that sample, the pairs, and the dialogue of each pair."""

    replies: list[list[int]]
    reflections: list[list[int]]
    answers: list[list[int]]
    pairs: list[PairIds]
    groups: list[str]


def make_job(seeds: list[list[TurnPair]], tests: list[list[TurnPair]], tokenizer: ChatTokenizer) -> Job:
    turns = [turn for dialogue in seeds for turn in dialogue]
    request = prompts_of("strategy").refine
    pairs = [turn.ids(tokenizer) for turn in turns]
    return Job(
        replies=[pair.prompt for pair in pairs],
        reflections=[tokenizer.encode_chat(reflection_prompt(turn.messages, turn.chosen, request)) for turn in turns],
        answers=[tokenizer.encode_chat(turn.messages) for dialogue in tests for turn in dialogue],
        pairs=pairs,
        groups=[str(number) for number, dialogue in enumerate(seeds) for _ in dialogue],
    )


class Clock:
    """Seconds by stage: on the clock, or ``of_processor``, all threads of this process together."""

    def __init__(self, of_processor: bool) -> None:
        self.now = time.process_time if of_processor else time.perf_counter
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str, scale: float = 1.0) -> Iterator[None]:
        started = self.now()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[stage] = (self.now() - started) * scale


@dataclass(frozen=True)
class Settings:
    """Tokens of a reply and of a reflection, how often the pairs are trained on, and which seconds are counted."""

    new: int
    reflection_new: int
    epochs: int
    processor_time: bool

    def clock(self) -> Clock:
        return Clock(self.processor_time)


def selfevo_iteration(folder: str, dtype: str, settings: Settings, slots: int, max_tokens: int) -> Work:
    keep_freed_memory()  # as examples/iterate.py does
    device, kind = device_and_dtype(dtype)
    model = load_model(folder, dtype=kind, device=device)
    inject_lora(model, RANK, ALPHA)
    freeze_adapter(model)
    training = TrainSettings(learning_rate=RATE, epochs=settings.epochs, max_tokens=max_tokens)

    def sample(prompts: list[list[int]], new: int) -> None:
        replies = generate(model, prompts, max_new_tokens=new, batch_size=slots, **vars(SAMPLING))
        assert all(len(reply) == new for reply in replies)

    def work(job: Job) -> dict[str, float]:
        clock = settings.clock()
        with clock("replies"):
            sample(job.replies, settings.new)
        with clock("reflections"):
            sample(job.reflections, settings.reflection_new)
        with clock("reference"):
            reference = reference_logps(model, job.pairs, max_tokens)
        with clock("training"), tempfile.TemporaryDirectory() as out:
            objective = DPOObjective(job.pairs, reference, job.groups, BETA, GAMMA)
            metrics = train(model, objective, Path(out), training)
        with clock("answers"):
            sample(job.answers, settings.new)
        return clock.seconds | {"loss": statistics.mean(record["loss"] for record in metrics)}

    return work


class Others:
    """transformers' ``generate``, TRL's DPOTrainer and peft on one model, ``sample`` turns of every stage."""

    def __init__(self, folder: str, dtype: str, settings: Settings, sample: int) -> None:
        self.settings, self.sample = settings, sample
        self.trainer = dpo_trainer(folder, dtype, STEP, checkpointed=False, stored_reference=True)
        self.model = self.trainer.model
        self.optimiser = self.trainer.create_optimizer()
        self.batch, self.continuous, self.pair_batch = 1, False, 1

    def choose(self, job: Job, batches: list[int], pair_batches: list[int], continuous: bool) -> None:
        """Takes the fastest batch sizes, each tried on as many turns as a round has."""
        prompts, pairs = self.some(job.replies, len), self.some(job.pairs, pair_length)

        def generate_in(way: tuple[int, bool]) -> None:
            self.batch, self.continuous = way
            self.generate(prompts, self.settings.new)

        def train_in(batch: int) -> None:
            self.pair_batch = batch
            self.step(self.reference(pairs[:STEP]))

        ways = [(batch, False) for batch in batches] + [(len(prompts), True)] * continuous
        with self.merged():
            self.batch, self.continuous = fastest(ways, generate_in, self.settings.clock())
        self.pair_batch = fastest(pair_batches, train_in, self.settings.clock())

    def some(self, items: list[T], length: Callable[[T], int]) -> list[T]:
        return evenly(items, min(self.sample, len(items)), length)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """With the adapter in the weights."""
        self.model.eval()
        self.model.merge_adapter()
        yield
        self.model.unmerge_adapter()

    def generate(self, prompts: list[list[int]], new: int) -> None:
        for part in parts(prompts, self.batch):
            transformers_sample(self.model, part, new, self.continuous)

    def reference(self, pairs: list[PairIds]) -> list[dict[str, Any]]:
        """The trainer's rows, with the reference's log-probabilities."""
        rows = dpo_rows(pairs)
        for part in parts(rows, self.pair_batch):
            with torch.no_grad():
                both = self.trainer.compute_ref_log_probs(self.model, self.trainer.data_collator(part))
            for row, chosen, rejected in zip(part, *both):
                row |= {"ref_chosen_logps": chosen.item(), "ref_rejected_logps": rejected.item()}
        return rows

    def step(self, rows: list[dict[str, Any]]) -> float:
        """One optimiser step; returns the loss."""
        micro = parts(rows, self.pair_batch)
        self.trainer.current_gradient_accumulation_steps = len(micro)
        loss = sum(self.trainer.training_step(self.model, self.trainer.data_collator(part)).item() for part in micro)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), TrainSettings.max_grad_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss


def others_iteration(
    folder: str, dtype: str, settings: Settings, sample: int, trial: Job, batches: list[int], pair_batches: list[int],
    continuous: bool,
) -> Work:  # fmt: skip
    others = Others(folder, dtype, settings, sample)
    others.choose(trial, batches, pair_batches, continuous)

    def work(job: Job) -> dict[str, float]:
        clock = settings.clock()
        prompts, pairs = others.some(job.replies, len), others.some(job.pairs, pair_length)
        scale = len(job.pairs) / len(pairs)
        with others.merged():
            with clock("replies", scale):
                others.generate(prompts, settings.new)
            with clock("reflections", scale):
                others.generate(others.some(job.reflections, len), settings.reflection_new)
        with clock("reference", scale):
            rows = others.reference(pairs)
        with clock("training", scale):
            losses = [others.step(part) for _ in range(settings.epochs) for part in parts(rows, STEP)]
        answers = others.some(job.answers, len)
        with others.merged(), clock("answers", len(job.answers) / len(answers)):
            others.generate(answers, settings.new)
        ways = {"batch": others.batch, "continuous": others.continuous, "pair_batch": others.pair_batch}
        return clock.seconds | {"loss": statistics.mean(losses)} | ways

    return work


def pair_length(pair: PairIds) -> int:
    return len(pair.prompt)


def parts(items: list[T], size: int) -> list[list[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def fastest(ways: list[T], use: Callable[[T], None], clock: Clock) -> T:
    """Of several ways the one that takes the least time, each used once."""
    for way in ways if len(ways) > 1 else []:
        with clock(str(way)):
            use(way)
        print(f"tried {way}: {clock.seconds[str(way)]:.1f} s", flush=True)
    return min(ways, key=lambda way: clock.seconds.get(str(way), 0.0))


def whole(result: Result) -> float:
    return sum(result.counts[stage] for stage in STAGES)


def tell(result: Result) -> str:
    stages = ", ".join(f"{stage} {result.counts[stage]:.1f}" for stage in STAGES)
    return f"{whole(result):.1f} s ({stages}), loss {result.counts['loss']:.4f}"


def report(ours: list[Result], theirs: list[Result]) -> str:
    measures: dict[str, Callable[[Result], float]] = {
        stage: lambda result, stage=stage: result.counts[stage]  # type: ignore[misc]
        for stage in STAGES
    }
    lines = ["| | selfevo, s | transformers + TRL, s | we are times as fast |", "|---|---|---|---|"]
    for name, measure in {"whole": whole, **measures}.items():
        mine, other = [measure(result) for result in ours], [measure(result) for result in theirs]
        ratios = [b / a for a, b in zip(mine, other)]
        lines.append(f"| {name} | {spread(mine)} | {spread(other)} | {spread(ratios)} |")
    peaks = [max(result.peak for result in results) for results in (ours, theirs)]
    above = [max(result.peak - result.resting for result in results) for results in (ours, theirs)]
    for title, values in (("peak, GiB", peaks), ("above rest, GiB", above)):
        lines.append(f"| {title} | {values[0] / GIB:.2f} | {values[1] / GIB:.2f} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dialogues, e.g. ESConv.json")
    parser.add_argument("--backbone", help="folder of a checkpoint of the Llama, Qwen2 or Mistral family")
    parser.add_argument("--tokenizer", help="without --backbone: folder or hub id of a tokenizer")
    parser.add_argument("--shape", choices=list(SHAPES), default="small", help="shape of random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights")
    parser.add_argument("--rounds", type=int, default=2, help="counted rounds (default: 2)")
    parser.add_argument("--dialogues", type=int, default=2, help="dialogues to learn from, and as many to answer")
    parser.add_argument("--new", type=int, default=40, help="new tokens of a reply (default: 40)")
    parser.add_argument("--reflection-new", type=int, default=160, help="new tokens of a reflection (default: 160)")
    parser.add_argument("--epochs", type=int, default=TrainSettings.epochs, help="epochs over the pairs (default: 2)")
    parser.add_argument("--slots", type=int, default=192, help="our slots (default: 192)")
    parser.add_argument("--max-tokens", type=int, default=4096, help="distinct tokens of one packed row of ours")
    parser.add_argument("--sample", type=int, default=8, help="turns of each stage that the others do (default: 8)")
    parser.add_argument("--peer-batch", type=int, nargs="+", default=[8], help="batch sizes of generate to try")
    parser.add_argument("--peer-pairs", type=int, nargs="+", default=[4], help="batch sizes of the DPOTrainer to try")
    parser.add_argument("--continuous", action="store_true", help="also try continuous batching of transformers")
    parser.add_argument(
        "--processor-time", action="store_true",
        help="count processor seconds: with one thread, on a machine that does other work, too",
    )  # fmt: skip
    options = parser.parse_args()
    if not (options.backbone or options.tokenizer):
        parser.error("give --backbone, or --tokenizer for random weights")
    tokenizer = load_tokenizer(options.backbone or options.tokenizer)
    each = options.dialogues
    dialogues = dialogue_turns(options.data, 0, 2 * each * options.rounds)
    members = [dialogues[i : i + each] for i in range(0, len(dialogues), each)]
    jobs = [make_job(seeds, tests, tokenizer) for seeds, tests in zip(members[::2], members[1::2])]
    one_turn = [dialogues[0][:1]]
    warm_up = make_job(one_turn, one_turn, tokenizer)
    settings = Settings(options.new, options.reflection_new, options.epochs, options.processor_time)
    with tempfile.TemporaryDirectory() as folder:
        if not options.backbone:
            write_random(options.shape, Path(folder), tokenizer, getattr(torch, options.dtype))
        common = {"folder": options.backbone or folder, "dtype": options.dtype, "settings": settings}
        contenders = [
            Contender("selfevo", selfevo_iteration, **common, slots=options.slots, max_tokens=options.max_tokens),
            Contender(
                "transformers + TRL", others_iteration, **common, sample=options.sample, trial=jobs[0],
                batches=options.peer_batch, pair_batches=options.peer_pairs, continuous=options.continuous,
            ),
        ]  # fmt: skip
        results = compete(contenders, [warm_up, *jobs], tell)
        for contender in contenders:
            contender.close()
    ours, theirs = results.values()
    pairs, answers = (statistics.mean(len(part) for part in kind) for kind in
                      ([job.pairs for job in jobs], [job.answers for job in jobs]))  # fmt: skip
    weights = options.backbone or f"{options.shape}, random weights"
    way = "continuous batching" if theirs[0].counts["continuous"] else f"batches of {theirs[0].counts['batch']:.0f}"
    seconds = "processor seconds" if options.processor_time else "seconds on the clock"
    print(
        f"\n{weights}, {options.dtype}, {torch.get_num_threads()} threads, {os.cpu_count()} processors, torch "
        f"{torch.__version__}\n{pairs:.0f} turns to learn from, {answers:.0f} to answer; {options.new} tokens a reply, "
        f"{options.reflection_new} a reflection, {options.epochs} epochs\nthe others: {options.sample} turns a stage, "
        f"scaled to all; {way} to sample, {theirs[0].counts['pair_batch']:.0f} pairs to train; {seconds}\n"
    )
    print(report(ours, theirs))


if __name__ == "__main__":
    main()
