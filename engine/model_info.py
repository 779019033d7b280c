"""Where a model is and what its JSON files say about it. Knows no torch, so any process may ask.

A model is an ordinary Hugging Face directory: config.json, *.safetensors, tokenizer.json, and perhaps generation_config.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.errors import InvalidRequest, ModelLoadError

DEFAULT_MODEL = "smollm2"
"""The name of the model that comes as a wheel; `engine.default_model` converts it once."""

_LENGTH_FIELDS = ("max_position_embeddings", "max_sequence_length", "n_positions", "seq_length", "model_max_length")
_DEFAULT_LENGTH = 2048  # a config without any length field: what the first llama was trained with


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the host side needs to know of a model; JSON-ready by `dataclasses.asdict`."""

    path: str
    architecture: str
    vocab_size: int
    max_length: int
    """Positions that the model's config allows (tokens of prompt and output together)."""
    eos_ids: tuple[int, ...]
    """End-of-sequence ids: the union of generation_config.json, config.json and the tokenizer's eos_token."""
    dtype: str
    """The checkpoint's: 'float32', 'float16' or 'bfloat16'."""

    @classmethod
    def read(cls, path: Path) -> ModelInfo:
        """Read a model directory's JSON files. Raise `ModelLoadError` naming the file that is missing or broken."""
        config = read_config(path)
        architectures = config.get("architectures") or ["(none)"]
        generation = _read_json(path / "generation_config.json") if (path / "generation_config.json").is_file() else {}
        return cls(
            path=str(path),
            architecture=str(architectures[0]),
            vocab_size=_whole(config, "vocab_size", path),
            max_length=_max_length(config),
            eos_ids=_eos_ids(generation, config, path),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
        )


def locate_model(path_or_id: str | Path) -> Path:
    """Return the directory of a local path, of 'smollm2' (converted on first use), or of a hub id (downloaded if need be).

    Raise `ModelLoadError` with one line that says what to do.
    """
    if not isinstance(path_or_id, str | os.PathLike):
        raise InvalidRequest(f"model_path is a directory or a hub id, not {type(path_or_id).__name__}", param="model_path")
    text = os.fspath(path_or_id)
    local = Path(text).expanduser()
    if text and local.is_dir():  # '' would be the current directory
        return local.resolve()
    if text == DEFAULT_MODEL:
        from engine.default_model import default_model_dir  # pulls in torch and gguf, only for this model

        return default_model_dir()
    if text and local.exists():
        raise ModelLoadError(
            f"{text} is a file; give the directory that holds config.json and *.safetensors", param="model_path"
        )
    if text.startswith(("/", "./", "../", "~")) or text.count("/") > 1 or not text:
        raise ModelLoadError(
            f"there is no directory {text!r}; give a Hugging Face model directory, a hub id or 'smollm2'", param="model_path"
        )
    return _from_hub(text)


def _from_hub(model_id: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and most models are local
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    remedy = "give a local Hugging Face directory, or 'smollm2'"
    try:
        return Path(snapshot_download(model_id, allow_patterns=wanted))
    except (HFValidationError, ValueError):
        raise ModelLoadError(f"{model_id!r} is neither a directory nor a hub id; {remedy}", param="model_path") from None
    except GatedRepoError:
        raise ModelLoadError(
            f"the hub asks for a login to give out {model_id!r}; run `hf auth login`, or {remedy}", param="model_path"
        ) from None
    except RepositoryNotFoundError:
        raise ModelLoadError(f"the hub has no model {model_id!r} (or it is private); {remedy}", param="model_path") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
        cause = "HF_HUB_OFFLINE is set" if offline else f"the hub can't be reached ({type(error).__name__})"
        raise ModelLoadError(
            f"{model_id!r} is no local directory and not in the hub cache, and {cause}; {remedy}", param="model_path"
        ) from None


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json. Raise `ModelLoadError` where it is missing or not a JSON object."""
    if not (path / "config.json").is_file():
        raise ModelLoadError(f"{path} has no config.json; give a Hugging Face model directory", param="model_path")
    return _read_json(path / "config.json")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file} can't be read: {error}; download the model again", param="model_path") from None
    if not isinstance(data, dict):
        raise ModelLoadError(f"{file} is not a JSON object; download the model again", param="model_path")
    return data


def _max_length(config: Mapping[str, Any]) -> int:
    """Give the positions that the config says, or that its rope scaling reaches where it says how long the training was."""
    said = next((int(config[name]) for name in _LENGTH_FIELDS if config.get(name)), _DEFAULT_LENGTH)
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    trained, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if (scaling.get("rope_type") or scaling.get("type")) == "dynamic":
        trained = said  # as transformers takes it, whatever else the config says
    # What isn't a number is refused by name where the rope is read.
    return max(said, int(trained * factor)) if trained and isinstance(factor, int | float) and factor > 1 else said


def _whole(config: Mapping[str, Any], name: str, path: Path) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ModelLoadError(f"{path}/config.json has no usable {name!r} (found {value!r})", param="model_path")
    return value


def _eos_ids(generation: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    found: list[int] = []
    for source in (generation.get("eos_token_id"), config.get("eos_token_id")):
        found += source if isinstance(source, list) else [source] if isinstance(source, int) else []
    found += _tokenizer_eos(path)
    return tuple(dict.fromkeys(int(i) for i in found))


def _tokenizer_eos(path: Path) -> Iterable[int]:
    """Look the tokenizer's eos_token up in tokenizer.json's added tokens, without loading the whole tokenizer.

    Chat models often end a turn with a token that only tokenizer_config.json names; missing it they never stop.
    """
    files = (path / "tokenizer_config.json", path / "tokenizer.json")
    if not all(file.is_file() for file in files):
        return ()
    eos = _read_json(files[0]).get("eos_token")
    text = eos.get("content") if isinstance(eos, dict) else eos
    added = _read_json(files[1]).get("added_tokens") or ()
    return tuple(token["id"] for token in added if text is not None and token.get("content") == text)
