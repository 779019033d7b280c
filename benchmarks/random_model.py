"""Write a model with random bfloat16 weights in the shape of Llama-3.1-8B: `python benchmarks/random_model.py DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

VOCABULARY = 128256


def save_random_llama_8b(folder: Path) -> Path:
    """Save config and weights (16 GB, no tokenizer) in `folder`: normal weights of std 0.02, plain rope."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5, initializer_range=0.02,
        bos_token_id=0, eos_token_id=1, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(str(folder), max_shard_size="2GB")
    return folder


if __name__ == "__main__":
    save_random_llama_8b(Path(sys.argv[1]))
