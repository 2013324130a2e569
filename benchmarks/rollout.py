"""Sampling replies to real dialogues: this library's decoder against ``generate`` of transformers.

    python benchmarks/rollout.py --data ESConv.json --tokenizer Qwen/Qwen2-0.5B-Instruct [--shape small]

Everyone loads the same random Qwen2-shaped weights and answers prompts of the same dialogues with exactly ``--new``
tokens, at the paper's sampling settings. We take all supporter turns of a few whole dialogues a round; transformers
gets a left-padded batch of them, taken evenly by length, so that its tokens per prompt are the same on average. Each
contender has a process of its own; rounds alternate, and the first of each is not counted. ``--adapters`` adds LoRA of
rank 8 on every linear layer (peft's on the other side). ``--continuous`` also runs the continuous batching of
transformers, which needs a version that has it, and ``--vllm`` vLLM, without adapters, where it is installed.
``--beside`` runs the rounds once more beside a process that keeps one processor busy.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from contest import GIB, Contender, Result, Work, busy_process, compete, spread
from shapes import SHAPES, dialogue_pairs, evenly, write_random
from train import ALPHA, LINEARS, RANK, device_and_dtype

from selfevo.generate import Sampling, generate
from selfevo.generate.decoder import Phase
from selfevo.lora import inject_lora
from selfevo.models import load_model, load_tokenizer
from selfevo.training import keep_freed_memory
from selfevo.trie import build_trie

Job = list[list[int]]  # prompts
SAMPLING = Sampling()


class Stopwatch:
    """The decoder's observer: seconds of each phase, prompt tokens computed, slots busy while prompts wait."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.counts: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: Phase, rows: int, waiting: int) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._add(phase, time.perf_counter() - started)
        if phase == "prefill":
            self._add("computed", rows)
        elif phase == "decode" and waiting:
            self._add("busy", rows)
            self._add("slots", self.slots)

    def _add(self, name: str, value: float) -> None:
        self.counts[name] = self.counts.get(name, 0.0) + value


def selfevo_decoder(folder: str, dtype: str, new: int, batch: int, adapters: bool) -> Work:
    keep_freed_memory()  # as examples/iterate.py does
    device, kind = device_and_dtype(dtype)
    model = load_model(folder, dtype=kind, device=device)
    if adapters:
        inject_lora(model, RANK, ALPHA)

    def work(job: Job) -> dict[str, float]:
        watch = Stopwatch(min(batch, len(job)))
        replies = generate(model, job, max_new_tokens=new, batch_size=batch, observer=watch, **vars(SAMPLING))
        assert all(len(reply) == new for reply in replies)
        counts = {"replies": len(job), "busy": 0.0, "slots": 0.0, **watch.counts}
        return counts | {"computed": counts["computed"] / len(build_trie(job))}

    return work


def transformers_sample(model: Any, prompts: Job, new: int, continuous: bool = False) -> None:
    """Samples exactly ``new`` tokens for each prompt with ``generate``, in one left-padded batch or continuously."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True, temperature=SAMPLING.temperature, top_p=SAMPLING.top_p, top_k=SAMPLING.top_k,
        repetition_penalty=SAMPLING.repetition_penalty, max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    if continuous:
        outputs = model.generate_batch(inputs=prompts, generation_config=config)
        assert len(outputs) == len(prompts)
        return
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    mask = (torch.arange(width, device=model.device)[None] >= width - lengths[:, None]).long()
    with torch.inference_mode():
        result = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    assert result.shape[1] == width + new


def transformers_generate(folder: str, dtype: str, new: int, batch: int, adapters: bool, continuous: bool) -> Work:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device, kind = device_and_dtype(dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    model.to(device)
    if adapters:
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS))

    def work(job: Job) -> dict[str, float]:
        transformers_sample(model, evenly(job, batch, len), new, continuous)
        return {"replies": batch}

    return work


def vllm_generate(folder: str, dtype: str, new: int, memory: float) -> Work:
    """All prompts at once, with its prefix cache on; ``memory`` is the share of the GPU's that it may take."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a contender's process may have no children
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    model = LLM(folder, dtype=dtype, enable_prefix_caching=True, gpu_memory_utilization=memory)
    sampling = SamplingParams(
        temperature=SAMPLING.temperature, top_p=SAMPLING.top_p, top_k=SAMPLING.top_k,
        repetition_penalty=SAMPLING.repetition_penalty, max_tokens=new, min_tokens=new, ignore_eos=True, seed=0,
        detokenize=False,
    )  # fmt: skip

    def work(job: Job) -> dict[str, float]:
        outputs = model.generate([{"prompt_token_ids": prompt} for prompt in job], sampling, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == new for output in outputs)
        return {"replies": len(outputs)}

    return work


def bandwidth(device: torch.device, size: int = 2**28, tries: int = 20) -> float:
    """Bytes read per second by a sum over float32 numbers that no cache holds."""
    numbers = torch.ones(size, device=device)
    best = float("inf")
    for _ in range(tries):
        started = time.perf_counter()
        float(numbers.sum())
        best = min(best, time.perf_counter() - started)
    return 4 * size / best


def weight_bytes(shape: str, dtype: str) -> int:
    """What a decode step has to read: every matrix once, the embedding only as the head."""
    config = SHAPES[shape]
    wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * wide + 2 * narrow + 3 * config.intermediate_size)
    width = 4 if dtype == "float32" else 2
    return width * (config.num_layers * layer + config.vocab_size * config.hidden_size)


def tell(result: Result) -> str:
    return f"{result.counts['replies']:.0f} replies in {result.seconds:.1f} s"


def table(results: dict[str, list[Result]], new: int) -> str:
    lines = ["| | replies/s | new tokens/s | peak above rest, GiB | we are times as fast |", "|---|---|---|---|---|"]
    for name, rounds in results.items():
        rates = [result.counts["replies"] / result.seconds for result in rounds]
        ratios = [mine.counts["replies"] / mine.seconds / rate for mine, rate in zip(results["selfevo"], rates)]
        above = max(result.peak - result.resting for result in rounds) / GIB
        lines.append(
            f"| {name} | {spread(rates)} | {statistics.median(rates) * new:.3g} | {above:.2f} | "
            f"{'' if name == 'selfevo' else spread(ratios)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dialogues, e.g. ESConv.json")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id of a tokenizer")
    parser.add_argument("--shape", choices=list(SHAPES), default="small", help="model shape (default: small)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default: 3)")
    parser.add_argument("--dialogues", type=int, default=4, help="dialogues of a round (default: 4)")
    parser.add_argument("--new", type=int, default=40, help="new tokens of a reply (default: 40)")
    parser.add_argument("--batch", type=int, default=32, help="our slots (default: 32)")
    parser.add_argument("--peer-batch", type=int, nargs="+", default=[8], help="batch sizes of the others (default: 8)")
    parser.add_argument("--adapters", action="store_true", help="with LoRA adapters")
    parser.add_argument("--continuous", action="store_true", help="also continuous batching of transformers")
    parser.add_argument(
        "--vllm", type=float, metavar="SHARE", help="also vLLM, with this share of the GPU's memory (0.4, say)"
    )
    parser.add_argument("--beside", action="store_true", help="then the same again beside one busy process")
    options = parser.parse_args()
    if options.vllm and options.adapters:
        parser.error("vLLM is run without adapters: --vllm and --adapters do not go together")
    tokenizer = load_tokenizer(options.tokenizer)
    dialogues = dialogue_pairs(options.data, tokenizer, 0, (options.rounds + 1) * options.dialogues)
    groups = [dialogues[i : i + options.dialogues] for i in range(0, len(dialogues), options.dialogues)]
    jobs = [[pair.prompt for pairs in members for pair in pairs] for members in groups]
    with tempfile.TemporaryDirectory() as folder:
        write_random(options.shape, Path(folder), tokenizer, getattr(torch, options.dtype))
        common = {"folder": folder, "dtype": options.dtype, "new": options.new, "adapters": options.adapters}
        contenders = [Contender("selfevo", selfevo_decoder, **common, batch=options.batch)]
        for continuous in (False, True) if options.continuous else (False,):
            for batch in options.peer_batch:
                name = f"transformers{' continuous' if continuous else ''}, batch {batch}"
                contenders.append(Contender(name, transformers_generate, **common, batch=batch, continuous=continuous))
        if options.vllm:
            peer = {"folder": folder, "dtype": options.dtype, "new": options.new, "memory": options.vllm}
            contenders.append(Contender("vLLM", vllm_generate, **peer))
        results = compete(contenders, jobs, tell)
        one = contenders[0].work([jobs[0][0]])
        if options.beside:
            with busy_process():
                crowded = compete(contenders, jobs, tell)
        for contender in contenders:
            contender.close()
    adapters = "with adapters" if options.adapters else "without adapters"
    print(
        f"\n{options.shape}, {options.dtype}, {adapters}, {options.new} new tokens, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, random weights"
    )
    print(f"\n{table(results, options.new)}")
    if options.beside:
        print(f"\nbeside one busy process:\n\n{table(crowded, options.new)}")
    ours = results["selfevo"]
    parts = {part: sum(r.counts[part] for r in ours) for part in ("prefill", "decode", "logits", "sample")}
    total = sum(result.seconds for result in ours)
    step = parts["decode"] + parts["logits"] + parts["sample"]
    plain = statistics.mean(sum(map(len, job)) / len(job) for job in jobs[1:])
    distinct = statistics.mean(len(build_trie(job)) / len(job) for job in jobs[1:])
    print(
        f"\nprompt tokens per reply: {plain:.0f}, distinct {distinct:.0f}; computed / distinct "
        f"{statistics.mean(r.counts['computed'] for r in ours):.3f}\n"
        f"our time: prefill {parts['prefill'] / total:.0%}, decode steps {step / total:.0%}; sampling "
        f"{parts['sample'] / step:.1%} of the decode steps"
    )
    busy, slots = (sum(r.counts[part] for r in ours) for part in ("busy", "slots"))
    if slots:
        print(f"slots busy while prompts wait: {busy / slots:.1%}")
    per_step = sum(one.counts[part] for part in ("decode", "logits", "sample")) / options.new
    rate, least = weight_bytes(options.shape, options.dtype) / per_step, bandwidth(device_and_dtype(options.dtype)[0])
    print(
        f"one reply alone: {per_step * 1e3:.1f} ms a step, {rate / 1e9:.1f} GB/s of weights, {rate / least:.0%} of the "
        f"{least / 1e9:.1f} GB/s that a plain sum reads"
    )


if __name__ == "__main__":
    main()
