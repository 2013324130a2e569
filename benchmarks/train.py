"""DPO + gamma * SFT on real dialogues: this library, TRL's DPOTrainer with PEFT, and a hand-written loop.

    python benchmarks/train.py --data ESConv.json --tokenizer Qwen/Qwen2-0.5B-Instruct [--shape small]

Everyone loads the same random Qwen2-shaped weights, adapts every linear layer with rank 8, and trains on the same real
pairs, one per supporter turn, reference log-probabilities included. We run the library's own loop, one epoch over a few
whole dialogues, in steps of 8 pairs, checkpoints and all. The others do one batch of 4 pairs a round (``--peer-pairs``
where that does not fit into memory), taken evenly from the turns of the same dialogues, which makes their tokens per
pair the same on average (the table shows them). Each contender has a process of its own; rounds alternate, and the
first of each is not counted.

The plain loop is what a careful researcher writes: transformers and peft, right-padded batches, the output head at
reply positions only, the reference from the same weights with the adapter switched off.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from contest import GIB, Contender, Result, Work, compete, product_seconds, spread
from shapes import SHAPES, dialogue_pairs, evenly, write_random

from selfevo.lora import inject_lora
from selfevo.losses import dpo_sft_loss
from selfevo.models import load_model, load_tokenizer
from selfevo.training import DPOObjective, PairIds, TrainSettings, both_sides, keep_freed_memory, reference_logps, train
from selfevo.trie import build_trie

RANK, ALPHA, BETA, GAMMA, RATE = 8, 16, 0.1, 1.0, 5e-6
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Job = list[list[PairIds]]  # the pairs of a few dialogues


def device_and_dtype(dtype: str) -> tuple[torch.device, torch.dtype]:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, dtype)


def selfevo_loop(folder: str, dtype: str, max_tokens: int, shuffle: str, checkpointed: bool) -> Work:
    keep_freed_memory()  # as examples/iterate.py does
    device, kind = device_and_dtype(dtype)
    model = load_model(folder, dtype=kind, device=device)
    inject_lora(model, RANK, ALPHA)
    model.checkpoint_activations = checkpointed
    passed = [0]  # tokens through the layers: the reference once, a step forward and backward

    def count(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        passed[0] += arguments[0].numel() * (2 if torch.is_grad_enabled() else 1)

    model.model.embed_tokens.register_forward_pre_hook(count)

    def work(job: Job) -> dict[str, float]:
        passed[0] = 0
        pairs = [pair for dialogue in job for pair in dialogue]
        groups = [str(number) for number, dialogue in enumerate(job) for _ in dialogue]
        objective = DPOObjective(pairs, reference_logps(model, pairs, max_tokens), groups, BETA, GAMMA)
        settings = TrainSettings(learning_rate=RATE, epochs=1, max_tokens=max_tokens, shuffle=shuffle)
        with tempfile.TemporaryDirectory() as out:
            metrics = train(model, objective, Path(out), settings)
        loss = statistics.mean(record["loss"] for record in metrics)
        return {"pairs": len(pairs), "loss": loss, "passed": passed[0]}

    return work


def sample(job: Job, count: int) -> list[PairIds]:
    """``count`` pairs, evenly by length of context."""
    return evenly([pair for dialogue in job for pair in dialogue], count, lambda pair: len(pair.prompt))


def dpo_trainer(folder: str, dtype: str, batch: int, checkpointed: bool, stored_reference: bool = False) -> Any:
    """TRL's trainer of a new adapter; with ``stored_reference`` batches bring the reference's log-probabilities."""
    from datasets import Dataset  # type: ignore[import-untyped]
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

    device, kind = device_and_dtype(dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), beta=BETA, loss_type=["sigmoid", "sft"], loss_weights=[1.0, GAMMA],
        per_device_train_batch_size=batch, learning_rate=RATE, bf16=False, report_to=[], max_length=None,
        gradient_checkpointing=checkpointed, use_cpu=device.type == "cpu", precompute_ref_log_probs=stored_reference,
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, task_type="CAUSAL_LM")
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    trainer = DPOTrainer(
        model=model, args=config, train_dataset=Dataset.from_list([row]), processing_class=tokenizer, peft_config=lora
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def dpo_rows(pairs: Sequence[PairIds]) -> list[dict[str, Any]]:
    """Pairs as TRL's collator wants them."""
    return [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]


def trl(folder: str, dtype: str, batch: int, checkpointed: bool) -> Work:
    trainer = dpo_trainer(folder, dtype, batch, checkpointed)
    optimiser = trainer.create_optimizer()

    def work(job: Job) -> dict[str, float]:
        pairs = sample(job, batch)
        loss = trainer.training_step(trainer.model, trainer.data_collator(dpo_rows(pairs)))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return {"pairs": len(pairs), "loss": loss.item()}

    return work


def plain_loop(folder: str, dtype: str, batch: int, checkpointed: bool) -> Work:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device, kind = device_and_dtype(dtype)
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    base.to(device)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, task_type="CAUSAL_LM"))
    if checkpointed:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def logps(pairs: Sequence[PairIds]) -> torch.Tensor:
        sequences = [torch.tensor([*prompt, *reply]) for prompt, reply in both_sides(pairs)]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(device)
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
        starts = torch.tensor([len(prompt) for prompt, _ in both_sides(pairs)], device=device)
        place = torch.arange(ids.shape[1], device=device)[None]
        hidden = base.model(input_ids=ids, attention_mask=place < lengths[:, None]).last_hidden_state[:, :-1]
        wanted = ((place >= starts[:, None]) & (place < lengths[:, None]))[:, 1:]
        logits = base.lm_head(hidden[wanted]).float()
        picked = logits.log_softmax(-1).gather(1, ids[:, 1:][wanted][:, None])[:, 0]
        return picked.new_zeros(wanted.shape).masked_scatter(wanted, picked).sum(1)

    def work(job: Job) -> dict[str, float]:
        pairs = sample(job, batch)
        with torch.no_grad(), model.disable_adapter():
            reference = logps(pairs).view(2, -1)
        policy = logps(pairs).view(2, -1)
        lengths = torch.tensor([len(pair.chosen) for pair in pairs], device=device)
        loss = dpo_sft_loss(policy[0], policy[1], reference[0], reference[1], lengths, beta=BETA, gamma=GAMMA).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return {"pairs": len(pairs), "loss": loss.item()}

    return work


def tokens_of(job: Job, batch: int) -> dict[str, float]:
    """Per pair: tokens of both sequences, and distinct ones where a whole dialogue shares its context."""
    pairs = sum(map(len, job))
    plain = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for dialogue in job for p in dialogue)
    distinct = sum(len(build_trie([[*prompt, *reply] for prompt, reply in both_sides(d)])) for d in job)
    theirs = sample(job, batch)
    sampled = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in theirs) / len(theirs)
    replies = sum(len(p.chosen) + len(p.rejected) for dialogue in job for p in dialogue)
    return {"plain": plain / pairs, "sampled": sampled, "distinct": distinct / pairs, "replies": replies / pairs}


def least_seconds(shape: str, tokens: float, replies: float, rows: int, dtype: str) -> float:
    """Seconds that the products alone take at the measured rates, for so many tokens that pass through the layers and
    through the head, each counted once per direction; the adapters' own products, and attention, are left out."""
    config = SHAPES[shape]
    device, kind = device_and_dtype(dtype)
    wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    d, f = config.hidden_size, config.intermediate_size
    layer = [(d, wide), (d, narrow), (d, narrow), (wide, d), (d, f), (d, f), (f, d)]
    per_row = sum(product_seconds(rows, i, o, kind, device) for i, o in layer) * config.num_layers / rows
    head = product_seconds(128, d, config.vocab_size, kind, device) / 128
    return tokens * per_row + replies * head


def report(name: str, results: list[Result], ours: list[Result] | None) -> str:
    rates = [result.counts["pairs"] / result.seconds for result in results]
    peak = max(result.peak for result in results)
    above = max(result.peak - result.resting for result in results)
    line = f"| {name} | {spread(rates)} | {peak / GIB:.1f} | {above / GIB:.2f} |"
    if ours is None:
        return line + " |"
    ratios = [mine.counts["pairs"] / mine.seconds / rate for mine, rate in zip(ours, rates)]
    return line + f" {spread(ratios)} |"


def show_profile(work: Work, jobs: list[Job]) -> None:
    """Where the time of our second job goes: by our own steps, with all they call, and by single operations."""
    work(jobs[0])
    with torch.profiler.profile() as found:
        work(jobs[1])
    events = found.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    own = {event.key: event.cpu_time_total for event in events if event.key.startswith("_")}
    for title, parts in (
        ("our differentiable steps, forward and Backward", own),
        ("single operations", {event.key: event.self_cpu_time_total for event in events}),
    ):
        print(f"\n| {title} | share of the time |\n|---|---|")
        for name, time in sorted(parts.items(), key=lambda item: -item[1])[:14]:
            print(f"| {name} | {time / total:.2%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dialogues, e.g. ESConv.json")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id of a tokenizer")
    parser.add_argument("--shape", choices=list(SHAPES), default="small", help="model shape (default: small)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default: 3)")
    parser.add_argument("--dialogues", type=int, default=2, help="dialogues of a round (default: 2)")
    parser.add_argument("--against", nargs="*", choices=("trl", "plain"), default=["trl", "plain"], help="the others")
    parser.add_argument("--peer-pairs", type=int, default=4, help="pairs in a batch of the others (default: 4)")
    parser.add_argument("--max-tokens", type=int, default=4096, help="distinct tokens of one packed row")
    parser.add_argument(
        "--shuffle", choices=("dialogues", "pairs"), default="dialogues", help="as in examples/iterate.py"
    )
    parser.add_argument("--checkpoint-activations", action="store_true", help="recompute activations")
    parser.add_argument("--profile", action="store_true", help="only show where our own time goes")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    every = dialogue_pairs(options.data, tokenizer, 0, (options.rounds + 1) * options.dialogues)
    jobs = [every[i : i + options.dialogues] for i in range(0, len(every), options.dialogues)]
    with tempfile.TemporaryDirectory() as folder:
        write_random(options.shape, Path(folder), tokenizer, getattr(torch, options.dtype))
        common = {"folder": folder, "dtype": options.dtype}
        setup = {
            "max_tokens": options.max_tokens,
            "shuffle": options.shuffle,
            "checkpointed": options.checkpoint_activations,
        }
        if options.profile:
            show_profile(selfevo_loop(**common, **setup), jobs)
            return
        contenders = [Contender("selfevo", selfevo_loop, **common, **setup)]
        peers = common | {"batch": options.peer_pairs, "checkpointed": options.checkpoint_activations}
        if "plain" in options.against:
            contenders.append(Contender("plain loop", plain_loop, **peers))
        if "trl" in options.against:
            contenders.append(Contender("TRL + PEFT", trl, **peers))
        results = compete(
            contenders,
            jobs,
            lambda r: f"{r.counts['pairs']:.0f} pairs in {r.seconds:.1f} s, loss {r.counts['loss']:.4f}",
        )
        for contender in contenders:
            contender.close()
    print(f"\n{options.shape}, {options.dtype}, {torch.get_num_threads()} threads, {os.cpu_count()} processors, "
          f"torch {torch.__version__}, random weights, {options.shuffle} shuffled")  # fmt: skip
    print("\n| | pairs/s | peak, GiB | above rest, GiB | we are times as fast |\n|---|---|---|---|---|")
    ours = results["selfevo"]
    for name, rounds in results.items():
        print(report(name, rounds, None if name == "selfevo" else ours))
    counts = [tokens_of(job, options.peer_pairs) for job in jobs[1:]]
    mean = {key: statistics.mean(count[key] for count in counts) for key in counts[0]}
    print(
        f"\ntokens per pair: {mean['plain']:.0f} ({mean['sampled']:.0f} in the others' sample), distinct "
        f"{mean['distinct']:.0f} ({mean['plain'] / mean['distinct']:.1f} times fewer), of replies {mean['replies']:.0f}"
    )
    rate = statistics.median(r.counts["pairs"] / r.seconds for r in ours)
    passed = statistics.mean(r.counts["passed"] / r.counts["pairs"] for r in ours)
    for whose, tokens in (("the steps' own", passed), ("whole dialogues'", 3 * mean["distinct"])):
        least = least_seconds(options.shape, tokens, 3 * mean["replies"], 1024, options.dtype)
        print(
            f"{whose} products alone, at the rates measured here: {1 / least:.2f} pairs/s; we reach {rate * least:.0%}"
        )


if __name__ == "__main__":
    main()
