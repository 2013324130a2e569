"""Checkpoints as they are published run the whole loop without any flag about their format.

Weights are random and narrow; every other key of ``config.json`` is the published one, from its documentation, and so
is the format that the chat template writes. Tokenizers are those at hand: Mistral's stands for TinyLlama's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import CHATML, LLAMA31, ZEPHYR
from runs import ITERATE, dialogue
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from selfevo.models import load_model, load_tokenizer

COMMON = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True}
NARROW = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
PUBLISHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen2.5-0.5B-Instruct": ("qwen2", CHATML, {
        "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645,
        "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_sliding_window": False, "vocab_size": 151936,
    }),
    "Llama-3.2-1B-Instruct": ("llama3", LLAMA31, {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "head_dim": 16, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_key_value_heads": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "vocab_size": 128256,
    }),
    "TinyLlama-1.1B-Chat-v1.0": ("mistral-v0.3", ZEPHYR, {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        "max_position_embeddings": 2048, "model_type": "llama", "num_key_value_heads": 4, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.35.0", "vocab_size": 32768,
    }),
    "Mistral-7B-Instruct-v0.3": ("mistral-v0.3", "", {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_key_value_heads": 2, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0", "vocab_size": 32768,
    }),
}  # fmt: skip
CONFIGS = {"qwen2": Qwen2Config, "llama": LlamaConfig, "mistral": MistralConfig}


def publish(shared: Path, folder: Path, name: str) -> Path:
    tokenizer, template, config = PUBLISHED[name]
    config = COMMON | NARROW | config
    torch.manual_seed(0)
    peer = AutoModelForCausalLM.from_config(CONFIGS[config["model_type"]](**config)).bfloat16()
    peer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))  # as it was published, not as transformers writes it today
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared / "tokenizers" / tokenizer / file, folder / file)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_checkpoint_runs_the_loop_as_it_is(shared: Path, tmp_path: Path, name: str) -> None:
    folder = publish(shared, tmp_path / "backbone", name)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([load_tokenizer(folder).encode_chat([{"role": "user", "content": "I lost my job."}])])
    ours = load_model(folder, dtype=torch.float32)
    torch.testing.assert_close(ours(tokens), peer(tokens).logits, rtol=1e-3, atol=1e-4)
    esconv = tmp_path / "esconv.json"
    esconv.write_text(json.dumps([dialogue(number, turns=5) for number in range(4)]))
    flags = ["--limit", "4", "--epochs", "1", "--max-new-tokens", "8", "--reflection-tokens", "8", "--tries", "1"]
    flags += ["--iterations", "1"]
    command = [sys.executable, str(ITERATE), "--backbone", str(folder), "--esconv", str(esconv), "--test", str(esconv)]
    done = subprocess.run(
        [*command, *flags, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| M1 |" in done.stdout
