"""Writes what a run has made in the forms that other programs read.

    python examples/export.py --backbone DIR_OR_HUB_ID --adapter RUN/M2 --out DIR     the model, adapter merged in
    python examples/export.py pairs RUN/M1/pairs.jsonl [...] --out DIR                preference pairs for LLaMA-Factory

A model is an ordinary checkpoint in Hugging Face layout, for transformers, vLLM and lm-evaluation-harness. The adapter
is folded into the weights in float32, which are then rounded to the backbone's dtype. A bfloat16 weight swallows much
of a small update: what was lost is printed, and --dtype float32 keeps it all. Or leave the adapter as it is: PEFT loads
it beside the backbone.
Pairs go into one file in the ranking form of LLaMA-Factory's sharegpt layout, beside a dataset_info.json that describes
it; TRL loads pairs.jsonl as it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from program import program

from selfevo.datasets import Pair, read_pairs
from selfevo.files import write_json
from selfevo.lora import load_adapter, merge_adapters
from selfevo.models import load_model, load_tokenizer, save_pretrained

NAME = "selfevo_pairs"
_SPEAKERS = {"user": "human", "assistant": "gpt"}
_COLUMNS = {"messages": "conversations", "system": "system", "chosen": "chosen", "rejected": "rejected"}
DESCRIPTION = {"file_name": f"{NAME}.json", "formatting": "sharegpt", "ranking": True, "columns": _COLUMNS}


def as_ranking(pair: Pair) -> dict[str, Any]:
    """A pair in LLaMA-Factory's ranking form: turns that alternate, the last one the user's, and two answers to it."""
    spoken = [message for message in pair.prompt if message["role"] != "system"]
    return {
        "system": "\n".join(message["content"] for message in pair.prompt if message["role"] == "system"),
        "conversations": [{"from": _SPEAKERS[turn["role"]], "value": turn["content"]} for turn in spoken],
        "chosen": {"from": "gpt", "value": pair.chosen},
        "rejected": {"from": "gpt", "value": pair.rejected},
    }


def export_pairs(arguments: list[str]) -> str:
    parser = argparse.ArgumentParser(prog="export.py pairs", description="Preference pairs for LLaMA-Factory.")
    parser.add_argument("pairs", nargs="+", type=Path, metavar="PAIRS", help="pairs.jsonl of one or several iterations")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    options = parser.parse_args(arguments)
    check_empty(options.out)
    records = [as_ranking(pair) for path in options.pairs for pair in read_pairs(path)]
    write_json(options.out / f"{NAME}.json", records)
    write_json(options.out / "dataset_info.json", {NAME: DESCRIPTION})
    return f"{options.out}: {len(records)} pairs; train with dataset_dir: {options.out} and dataset: {NAME}"


def export_model(arguments: list[str]) -> str:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--backbone", required=True, help="folder in Hugging Face layout, or a hub id")
    parser.add_argument("--adapter", required=True, help="an adapter's folder, such as RUN/M2, or hub id")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights written (default: the backbone's)"
    )
    parser.add_argument("--revision", help="revision of a hub id")
    parser.add_argument("--chat-format", help="llama3, qwen2, mistral or plain, in place of the backbone's own")
    options = parser.parse_args(arguments)
    check_empty(options.out)
    tokenizer = load_tokenizer(options.backbone, revision=options.revision, chat_format=options.chat_format)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    model = load_model(options.backbone, dtype=dtype, revision=options.revision)
    names = load_adapter(model, options.adapter)
    lost = merge_adapters(model)
    save_pretrained(model, tokenizer, options.out)
    return f"{options.out}: {len(names)} layers folded; rounding lost at most {100 * lost:.2g} % of a layer's update"


def check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty; choose another --out")


@program(memory="export on a machine with more, or with --dtype bfloat16")
def main() -> int:
    arguments = sys.argv[1:]
    print(export_pairs(arguments[1:]) if arguments[:1] == ["pairs"] else export_model(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
