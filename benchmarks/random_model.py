"""Write a model with random bfloat16 weights in the shape of a Llama.

python benchmarks/random_model.py DIR                      # Llama-3.1-8B's shape, 16 GB of files
python benchmarks/random_model.py DIR --shape 70b --drawn  # no files: every engine draws the weights on its device
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This folder's `kernels.py` would be found for the room of that name, or for another project's package.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors.torch import save_file

VOCABULARY = 128256
_SHARD_BYTES = 1 << 30
_THREADS = 8
_STD = 0.02


SHAPES = {
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""SmolLM2's, in which the host is what a step waits for, and two of Llama 3.1's."""


def save_config(folder: Path, shape: str = "8b", vocabulary: int = VOCABULARY) -> Any:
    """Save config.json in `folder`, plain rope, and return the config."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "llama", vocab_size=vocabulary, **SHAPES[shape], max_position_embeddings=8192, rms_norm_eps=1e-5,
        initializer_range=_STD, bos_token_id=0, eos_token_id=1, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(str(folder))
    return config


def save_drawn_llama(folder: Path, shape: str, *, vocabulary: int = VOCABULARY) -> Path:
    """Save a model whose weights every engine draws on its own device (`engine.random_weights`)."""
    from engine.random_weights import MARK

    save_config(folder, shape, vocabulary)
    (folder / MARK).write_text(json.dumps({"seed": 0, "std": _STD}), encoding="utf-8")
    return folder


def save_random_llama_8b(folder: Path) -> Path:
    """Save config and weights (16 GB, no tokenizer) in `folder`: normal weights of std 0.02."""
    from transformers import AutoModelForCausalLM

    config = save_config(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards = list(_shards({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}))
    files = {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}
    # transformers' own saving does one file after the other, on one core: half a minute of a GPU that waits.
    with ThreadPoolExecutor(_THREADS) as writers:
        list(writers.map(lambda item: _write(folder / item[0], item[1]), files.items()))
    index = {"metadata": {}, "weight_map": {name: file for file, shard in files.items() for name in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Cut the tensors into files of about a gigabyte."""
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        shard[name] = shape
        size += 2 * torch.Size(shape).numel()
        if size >= _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _write(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(int(file.name.split("-")[1]))
    tensors = {}
    for name, shape in shapes.items():
        values = torch.ones(shape, dtype=torch.bfloat16, device=device)
        if len(shape) > 1:  # the norms stay ones
            values.normal_(0.0, _STD, generator=generator)
        tensors[name] = values.cpu()
    save_file(tensors, str(file), metadata={"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="with --drawn")
    parser.add_argument("--drawn", action="store_true", help="no files: engines draw the weights on their devices")
    given = parser.parse_args()
    if given.drawn:
        save_drawn_llama(given.folder, given.shape)
    else:
        save_random_llama_8b(given.folder)
