"""Hugging Face's config.json as a ModelConfig. What changes a model's function and is not supported is refused."""

from collections.abc import Mapping
from typing import Any

from popax.errors import ConfigError
from popax.modeling.block_scaled import BLOCK
from popax.modeling.config import LinearRope, Llama3Rope, ModelConfig, RopeScaling, YarnRope
from popax.modeling.hf_moe import DEEPSEEK, QWEN3_MOE, mla_config, moe_config, moe_problems

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": QWEN3_MOE,
    "deepseek_v3": DEEPSEEK,
    "kimi_k2": DEEPSEEK,
}
QWEN3 = ("Qwen3ForCausalLM", QWEN3_MOE)

# Hugging Face's key -> ModelConfig's, where a config.json without it is incomplete.
REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "intermediate_size": "ffw_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_seq_len",
}
# float16 has no place among the compute types; float32 holds every float16.
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}


def model_config(
    record: Mapping[str, Any], *, source: str, dtype: str | None = None, param_dtype: str | None = None
) -> ModelConfig:
    """The ModelConfig of a config.json, of transformers 4 or 5.

    param_dtype: by default as stored; dtype: by default as param_dtype. source: named in errors. Raises ConfigError,
    which lists every key that is missing or not supported.
    """
    record = {key: value for key, value in record.items() if value is not None}
    architecture = _architecture(record, source)
    _refuse(record, architecture, source)
    stored = str(record.get("dtype", record.get("torch_dtype", "float32"))).removeprefix("torch.")
    if stored not in DTYPES:
        raise ConfigError(f"{source}: dtype {stored!r} is not supported; one of {', '.join(DTYPES)}")
    param_dtype = param_dtype or DTYPES[stored]
    values = {ours: record[theirs] for theirs, ours in REQUIRED.items()}
    heads = record["num_attention_heads"]
    qwen2, mla = architecture == "Qwen2ForCausalLM", mla_config(record, architecture)
    bias = bool(record.get("attention_bias", False))
    head_dim = record.get("head_dim", record["hidden_size"] // heads)
    return ModelConfig(
        **values,
        num_kv_heads=record.get("num_key_value_heads", heads),
        # DeepSeek's files call head_dim what of a head has positions, or leave it out.
        head_dim=head_dim if mla is None else mla.nope_head_dim + mla.rope_head_dim,
        rope_theta=float(_rope(record, source).get("rope_theta", record.get("rope_theta", 1e4))),
        rope_scaling=_rope_scaling(record, source),
        attention_bias=True if qwen2 else bias,
        output_bias=False if qwen2 else bias,
        mlp_bias=architecture == "LlamaForCausalLM" and bool(record.get("mlp_bias", False)),
        qk_norm=architecture in QWEN3,
        rope_layout="interleaved" if mla is not None and record.get("rope_interleave", True) else "half",
        moe=moe_config(record, architecture),
        mla=mla,
        tied_embeddings=bool(record.get("tie_word_embeddings", False)),
        dtype=dtype or param_dtype,
        param_dtype=param_dtype,
    )


def _architecture(record: Mapping[str, Any], source: str) -> str:
    model_type = str(record.get("model_type"))
    named = str((record.get("architectures") or [ARCHITECTURES.get(model_type, model_type)])[0])
    if named not in ARCHITECTURES.values():
        raise ConfigError(
            f"{source}: architecture {named!r} is not supported; popax loads {', '.join(ARCHITECTURES.values())}"
        )
    return named


def _refuse(record: Mapping[str, Any], architecture: str, source: str) -> None:
    required = [*REQUIRED, *(("head_dim", "num_key_value_heads") if architecture in QWEN3 else ())]
    problems = [f"{key} is missing" for key in required if key not in record] + moe_problems(record, architecture)
    if record.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act={record['hidden_act']!r} is not supported, only 'silu'")
    if not _is_readable(record.get("quantization_config")):
        problems.append(
            f"quantization_config is not supported, only fp8 (e4m3) in blocks of {BLOCK} x {BLOCK}: load a checkpoint "
            "of full-precision weights"
        )
    if record.get("use_sliding_window") and record.get("max_window_layers", 0) < record.get("num_hidden_layers", 0):
        problems.append(f"use_sliding_window with sliding_window={record.get('sliding_window')} is not supported")
    kinds = sorted(set(record.get("layer_types", ())) - {"full_attention"})
    if kinds:
        problems.append(f"layer_types {kinds} are not supported, only 'full_attention'")
    if record.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor={record['partial_rotary_factor']} is not supported, only 1.0")
    if problems:
        raise ConfigError(f"{source}: {'; '.join(problems)}")


def _is_readable(quantization: Mapping[str, Any] | None) -> bool:
    """Whether weights are stored in full, or as block_scaled.py reads them; nothing but the storage depends on it."""
    if quantization is None:
        return True
    how = (quantization.get("quant_method"), quantization.get("fmt", "e4m3"), quantization.get("weight_block_size"))
    return how == ("fp8", "e4m3", [BLOCK, BLOCK])


def _rope(record: Mapping[str, Any], source: str) -> dict[str, Any]:
    """transformers 5 writes rope_parameters, with rope_theta among them; 4 wrote rope_scaling beside rope_theta."""
    found = record.get("rope_parameters") or record.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in found.values()):
        raise ConfigError(f"{source}: rope parameters for each kind of layer ({sorted(found)}) are not supported")
    return {key: value for key, value in found.items() if value is not None}


def _rope_scaling(record: Mapping[str, Any], source: str) -> RopeScaling | None:
    rope = _rope(record, source)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)  # some files carry both names
    rope.pop("rope_theta", None)
    # What transformers assumes where the original length is not given.
    original = rope.pop("original_max_position_embeddings", record["max_position_embeddings"])
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{source}: rope partial_rotary_factor other than 1.0 is not supported")
    makers = {
        "default": lambda **rest: _no_scaling(rest, source),
        "linear": LinearRope,
        "llama3": lambda **rest: Llama3Rope(original_max_seq_len=original, **rest),
        "yarn": lambda **rest: YarnRope(original_max_seq_len=original, **rest),
    }
    if kind not in makers:
        raise ConfigError(f"{source}: rope type {kind!r} is not supported; popax knows {', '.join(makers)}")
    try:
        return makers[kind](**rope)
    except TypeError as error:
        raise ConfigError(f"{source}: rope type {kind!r} with {rope}: {_cause(error)}") from error


def _no_scaling(rest: Mapping[str, Any], source: str) -> None:
    if rest:
        raise ConfigError(f"{source}: rope type 'default' takes no {', '.join(rest)}; is its rope_type missing?")


def _cause(error: TypeError) -> str:
    """The constructor's complaint without its name: which key is missing or unknown."""
    return str(error).partition("() ")[2] or str(error)
