"""What a decoder model is, as data: one table of architectures, one spec, one block that runs them all.

Knows no torch: an engine's options are checked against the spec before any weight is read.
A new architecture that differs only in biases, q/k norms, windows or rope is one row of `ARCHITECTURES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from headrace.errors import InvalidRequest, ModelLoadError
from headrace.validation import is_number


class Traits(NamedTuple):
    """How an architecture differs from plain llama. A string names the config field that decides."""

    qkv_bias: bool | Literal["attention_bias"] = False
    output_bias: bool | Literal["attention_bias"] = False
    mlp_bias: bool | Literal["mlp_bias"] = False
    qk_norm: bool = False
    """RMS norm over each head of q and k, before the rotation."""
    window: Literal["never", "always", "layer_types"] = "never"
    """Whether `sliding_window` is honoured: "always" by all layers unless the config's layer types name some, "layer_types" where
    `use_sliding_window` says so."""


_WINDOW, _FULL_LAYERS = 4096, 28
"""`sliding_window` and `max_window_layers` of a config that doesn't say them, as transformers reads it: null is none, missing is this."""

ARCHITECTURES: dict[str, Traits] = {
    "LlamaForCausalLM": Traits(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),  # SmolLM2 too
    "MistralForCausalLM": Traits(window="always"),
    "Qwen2ForCausalLM": Traits(qkv_bias=True, window="layer_types"),
    "Qwen3ForCausalLM": Traits(qkv_bias="attention_bias", output_bias="attention_bias", qk_norm=True, window="layer_types"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding: base frequency and how it is stretched. `kind` decides which of the other fields count."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn", "dynamic"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cos and sin (yarn)."""
    truncate: bool = True
    """Whether yarn rounds the bounds of its ramp to whole dimensions."""

    def stretch(self, length: int) -> float:
        """Give what the base of a sequence that may reach `length` tokens is stretched by (dynamic NTK): 1 up to the trained length.

        f · L / M - (f - 1), as `_compute_dynamic_ntk_parameters` of transformers' `modeling_rope_utils.py` has it. There L is what a forward
        pass happens to see, so that keys in the cache were turned by another base than the query; here a sequence has one from its start.
        """
        if self.kind != "dynamic" or length <= self.original_max_positions:
            return 1.0
        return self.factor * length / self.original_max_positions - (self.factor - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes and traits of one decoder, whole or (after `shard`) one rank's part of it."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSpec
    windows: tuple[int | None, ...]
    """For each layer: how many positions back (itself included) a query sees; None sees all."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    """Whether the output head is the embedding."""
    logn_from: int | None = None
    """The trained length M: a query at position p (from 0) with p + 1 > M is multiplied by log(p + 1) / log(M). None: none is."""
    awq_group: int | None = None
    """Inputs that share a scale, where the checkpoint's matrices are stored in 4 bits (`engine.awq`); -1: all of them. None: they aren't."""

    @classmethod
    def read(cls, config: Mapping[str, Any], *, rope_scaling_factor: float = 0.0, use_logn_attn: bool = False) -> ModelSpec:
        """Read a Hugging Face config. Raise `ModelLoadError` naming what is not supported or missing.

        From a `rope_scaling_factor` of 1 on the rope is stretched by it for each sequence that may outgrow the trained length; `InvalidRequest`
        where the config scales it in another way. `use_logn_attn`: see `logn_from`.
        """
        architecture, traits = _architecture(config)
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise ModelLoadError(
                f"hidden_act={activation!r} of {architecture} is not supported; this build has 'silu'", param="model_path"
            )
        hidden, heads, layers = (_size(config, name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
        return cls(
            architecture=architecture,
            vocab_size=_size(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_size(config, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=read_rope(config) if rope_scaling_factor < 1 else _stretched(config, rope_scaling_factor),
            windows=_windows(config, traits, layers),
            qkv_bias=_flag(config, traits.qkv_bias),
            output_bias=_flag(config, traits.output_bias),
            mlp_bias=_flag(config, traits.mlp_bias),
            qk_norm=traits.qk_norm,
            tied=bool(config.get("tie_word_embeddings", False)),
            logn_from=_trained_length(config) if use_logn_attn else None,
            awq_group=_awq_group(config),
        )

    def shard(self, size: int) -> ModelSpec:
        """Return one rank's part under tensor parallelism of `size`. KV heads are split, or replicated where they are fewer.

        Raise `InvalidRequest` (param 'tp') where the heads or the MLP don't divide.
        """
        if self.num_heads % size or self.intermediate_size % size:
            raise InvalidRequest(
                f"tp={size} doesn't divide {self.num_heads} heads and {self.intermediate_size} MLP columns of {self.architecture}",
                param="tp",
            )
        if self.num_kv_heads % size and size % self.num_kv_heads:
            raise InvalidRequest(
                f"tp={size} neither divides nor is a multiple of {self.num_kv_heads} KV heads of {self.architecture}",
                param="tp",
            )
        return replace(
            self,
            num_heads=self.num_heads // size,
            num_kv_heads=max(1, self.num_kv_heads // size),
            intermediate_size=self.intermediate_size // size,
        )


def _architecture(config: Mapping[str, Any]) -> tuple[str, Traits]:
    names = config.get("architectures") or ["(none)"]
    for name in names:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    raise ModelLoadError(
        f"architecture {names[0]!r} is not supported; supported are {', '.join(ARCHITECTURES)}", param="model_path"
    )


def _awq_group(config: Mapping[str, Any]) -> int | None:
    """Read `quantization_config`; refuse what isn't AWQ in 4 bits, by name."""
    given = config.get("quantization_config")
    if not given:
        return None
    if not isinstance(given, Mapping) or "quant_method" not in given:
        raise ModelLoadError(
            f"config.json has a quantization_config without 'quant_method' ({given!r}); download the model again",
            param="model_path",
        )
    method = given["quant_method"]
    if method != "awq":
        raise ModelLoadError(
            f"checkpoints quantised by {method!r} are not supported, only 'awq' is; give the model's bf16 or fp16 original",
            param="model_path",
        )
    for name, only in (("bits", 4), ("version", "gemm"), ("zero_point", True)):
        value = given.get(name, only)
        if (value.lower() if isinstance(value, str) else value) != only:
            raise ModelLoadError(
                f"an AWQ checkpoint with {name}={value!r} is not supported, only {only!r} is; give the model's bf16 or fp16 original",
                param="model_path",
            )
    group = given.get("group_size", 128)
    if not isinstance(group, int) or isinstance(group, bool) or group == 0 or group < -1:
        raise ModelLoadError(f"quantization_config has no usable 'group_size' (found {group!r})", param="model_path")
    return group


def _size(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ModelLoadError(f"config.json has no usable {name!r} (found {value!r})", param="model_path")
    return value


def _flag(config: Mapping[str, Any], trait: bool | str) -> bool:  # noqa: FBT001  # a trait is a truth or a field's name
    return bool(config.get(trait, False)) if isinstance(trait, str) else trait


def _windows(config: Mapping[str, Any], traits: Traits, layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window", _WINDOW)
    if traits.window == "never" or not window:
        return (None,) * layers
    if traits.window == "layer_types" and not config.get("use_sliding_window", False):
        return (None,) * layers
    types = config.get("layer_types")  # of a mistral too: transformers then takes it for a ministral
    if types is None:  # configs from before transformers 4.53 say it by a layer count
        first = 0 if traits.window == "always" else config.get("max_window_layers", _FULL_LAYERS)
        types = ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]
    return tuple(int(window) if kind == "sliding_attention" else None for kind in types)


def read_rope(config: Mapping[str, Any]) -> RopeSpec:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before). Refuse other kinds by name."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(given.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = str(given.get("rope_type") or given.get("type") or "default")
    partial = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ModelLoadError("partial_rotary_factor is not supported by this build", param="model_path")
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind not in ("linear", "llama3", "yarn", "dynamic"):
        raise ModelLoadError(
            f"rope scaling {kind!r} is not supported; supported are default, linear, llama3, yarn, dynamic", param="model_path"
        )
    factor = _factor(given, config)
    positions = int(given.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 8192)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=factor)
    if kind == "dynamic":
        return RopeSpec(theta=theta, kind="dynamic", factor=factor, original_max_positions=_trained_length(config))
    if kind == "llama3":
        return RopeSpec(
            theta=theta,
            kind="llama3",
            factor=factor,
            low_freq_factor=float(given.get("low_freq_factor", 1.0)),
            high_freq_factor=float(given.get("high_freq_factor", 4.0)),
            original_max_positions=positions,
        )
    return RopeSpec(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_positions=positions,
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        attention_factor=_yarn_attention(given, factor),
        truncate=bool(given.get("truncate", True)),
    )


def _stretched(config: Mapping[str, Any], factor: float) -> RopeSpec:
    """Give the config's rope, stretched from sequence to sequence."""
    rope = read_rope(config)
    if rope.kind not in ("default", "dynamic"):
        raise InvalidRequest(
            f"rope_scaling_factor={factor} stretches a rope that isn't scaled, but config.json scales this one ({rope.kind!r}); leave it at 0",
            param="rope_scaling_factor",
        )
    return RopeSpec(theta=rope.theta, kind="dynamic", factor=factor, original_max_positions=_trained_length(config))


def _trained_length(config: Mapping[str, Any]) -> int:
    """Give the positions that the model was trained with, beyond which ropes are stretched and queries scaled."""
    length = config.get("max_position_embeddings")
    if not isinstance(length, int) or length < 1:
        raise ModelLoadError(
            f"config.json has no usable 'max_position_embeddings' (found {length!r}): it says beyond what dynamic ropes and logn attention "
            "scale; leave rope_scaling_factor and use_logn_attn off",
            param="model_path",
        )
    return length


def _yarn_attention(given: Mapping[str, Any], factor: float) -> float:
    """Give the factor that yarn puts on cos and sin: as said, or 0.1·m·ln(factor)+1, over the all-dimension one if both are given."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    said = given.get("attention_factor")
    if said is not None:
        return float(said)
    mscale, all_dims = given.get("mscale"), given.get("mscale_all_dim")
    return scale(mscale) / scale(all_dims) if mscale and all_dims else scale(1.0)


def _factor(given: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """Give the stretch: as said, or how far the positions reach beyond those of the pre-training."""
    said, before, now = (
        given.get("factor"),
        given.get("original_max_position_embeddings"),
        config.get("max_position_embeddings"),
    )
    if said is not None:
        if not is_number(said) or said <= 0:
            raise ModelLoadError(f"config.json has no usable rope scaling 'factor' (found {said!r})", param="model_path")
        return float(said)
    return float(now) / float(before) if now and before else 1.0
