"""Weights of a Hugging Face directory: its config, its names, and whether its tensors are those of the model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from popax.errors import CheckpointError, ConfigError
from popax.modeling.block_scaled import DTYPE as FP8
from popax.modeling.block_scaled import SUFFIX, BlockScaled
from popax.modeling.config import ModelConfig
from popax.modeling.hf_config import model_config
from popax.modeling.model import Model
from popax.modeling.rounded import rounded_sources
from popax.modeling.shards import Source
from popax.modeling.stored_weights import StoredWeights
from popax.modeling.tensor_files import StoredTensor, open_tensors
from popax.trees import flatten_named

CONFIG = "config.json"
# Ours -> Hugging Face's, where they differ; the router and the experts are parts of what is called mlp there.
WORDS = {
    "attn": "self_attn",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_a_norm": "q_a_layernorm",
    "kv_a_proj": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "moe": "mlp",
    "router": "gate",
    "shared": "shared_experts",
}
LEAVES = {"bias": "bias", "correction_bias": "e_score_correction_bias"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that old versions of transformers stored; they follow from the config.
DERIVED = "rotary_emb.inv_freq"
# Layers behind the last one that predict further tokens in training; they are no part of the model's function.
PREDICTORS = ("num_nextn_predict_layers", "num_mtp_layers")  # as published, and as transformers 5 writes it


def read_config(directory: Path, *, dtype: str | None = None, param_dtype: str | None = None) -> ModelConfig:
    """The ModelConfig of a directory's config.json; not quantised."""
    source = str(directory / CONFIG)
    return model_config(_read_record(directory), source=source, dtype=dtype, param_dtype=param_dtype)


def _read_record(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{path} holds a {type(record).__name__}; a config is a JSON object")
    return record


def open_weights(directory: Path, model: Model) -> StoredWeights:
    """The weights in a directory's files, whose headers are read and data is not; quantised as the model is.

    Raises CheckpointError, naming every tensor that is missing, of a wrong shape, or not the model's.
    """
    tensors = open_tensors(directory)
    sources = rounded_sources(model, _match(model.unquantised, tensors, directory))
    tied = model.config.tied_embeddings and {EMBEDDING, HEAD} <= set(tensors)
    equal = (tensors[HEAD], tensors[EMBEDDING]) if tied else None
    return StoredWeights(directory=directory, model=model, sources=sources, equal=equal)


def hf_name(name: str, layer: int | None = None, expert: int | None = None) -> str:
    """Hugging Face's name of a parameter: layers/attn/q_proj/kernel, 3 -> model.layers.3.self_attn.q_proj.weight.

    layer: its number in the model, whatever stack it is in.
    """
    outer = {"embed/embedding": EMBEDDING, "final_norm/scale": "model.norm.weight", "lm_head/kernel": HEAD}
    if name in outer:
        return outer[name]
    _, *module, leaf = name.split("/")
    path = ".".join(f"experts.{expert}" if word == "experts" else WORDS.get(word, word) for word in module)
    return f"model.layers.{layer}.{path}.{LEAVES.get(leaf, 'weight')}"


def _match(model: Model, tensors: Mapping[str, StoredTensor], directory: Path) -> dict[str, Source]:
    missing, wrong, used, sources = [], [], set(), {}
    for name, like in flatten_named(model.abstract()).items():
        stack = model.stacks.get(name.partition("/")[0])
        source = Source([], (stack is not None) + ("/experts/" in name), name.endswith("/kernel"))
        shape = like.shape[source.stacked :][::-1] if source.transposed else like.shape[source.stacked :]
        for index in np.ndindex(like.shape[: source.stacked]):
            layer, *expert = index if stack is not None else (0,)
            wanted = hf_name(name, layer + (0 if stack is None else stack.first_layer), *expert)
            if wanted == EMBEDDING and model.config.tied_embeddings and wanted not in tensors:
                wanted = HEAD
            used.add(wanted)
            if wanted not in tensors:
                missing.append(wanted)
            elif tensors[wanted].shape != shape:
                wrong.append(f"{wanted} is {tensors[wanted].shape}, the config asks for {shape}")
            elif tensors[wanted].dtype != FP8:
                source.tensors.append(tensors[wanted])
            elif wanted + SUFFIX not in tensors:
                missing.append(wanted + SUFFIX)
            else:
                used.add(wanted + SUFFIX)
                source.tensors.append(BlockScaled(values=tensors[wanted], scales=tensors[wanted + SUFFIX]))
        sources[name] = source
    if model.config.tied_embeddings:
        used.add(HEAD)
    record, first = _read_record(directory), model.config.num_layers
    predictors = next((record[key] for key in PREDICTORS if record.get(key)), 0)
    ignored = tuple(f"model.layers.{layer}." for layer in range(first, first + predictors))
    extra = [
        name for name in sorted(set(tensors) - used) if not name.endswith(DERIVED) and not name.startswith(ignored)
    ]
    problems = [_some("missing", missing), _some("of a wrong shape", wrong), _some("not the model's", extra)]
    if any(problems):
        raise CheckpointError(
            f"{directory}: the tensors do not fit {CONFIG}: {'; '.join(filter(None, problems))}. "
            "Do config and weights belong together?"
        )
    return sources


def _some(what: str, names: list[str], shown: int = 5) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{what}: {', '.join(names[:shown])}{rest}" if names else ""
