"""Weights of a Hugging Face directory, streamed: each device's shard is read from the files by itself."""

import functools
import itertools
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from popax.errors import CheckpointError, ConfigError
from popax.modeling.block_scaled import DTYPE as FP8
from popax.modeling.block_scaled import SUFFIX, BlockScaled
from popax.modeling.config import ModelConfig
from popax.modeling.digest import TensorRecord, digest_records
from popax.modeling.hf_config import model_config
from popax.modeling.model import Model
from popax.modeling.quantised import SCALES, VALUES
from popax.modeling.rounded import RoundedReader
from popax.modeling.tensor_files import StoredTensor, open_tensors
from popax.sharding import ShardingRules
from popax.trees import flatten_named, unflatten_named
from popax.types import Params

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
# Copying a transposed matrix in strips is 2 to 3 times faster: a strip's cache lines are still there for the next row.
STRIP = 256


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


def load_weights(
    directory: Path, model: Model, *, mesh: Mesh | None = None, rules: ShardingRules | None = None
) -> tuple[Params, str]:
    """(params as model.config.param_dtype, or quantised as it says; digest of the tensors as stored).

    Host memory holds one shard of one parameter at a time; of one that is quantised, the rounded shard and one matrix.
    Raises CheckpointError, naming every tensor that is missing, of a wrong shape, not finite, or not the model's.
    """
    tensors, plain = open_tensors(directory), model.unquantised
    sources = _match(plain, tensors, directory)
    digest = _digest(directory, plain.config, tensors, sources)
    stored, abstract = flatten_named(plain.abstract()), flatten_named(model.abstract())
    shardings = flatten_named(model.shardings(mesh, rules)) if mesh is not None else {}
    params = {}
    for name, source in sources.items():
        shape, dtype = stored[name].shape, np.dtype(stored[name].dtype)
        if name in abstract:
            params[name] = _place(functools.partial(read_shard, source, shape, dtype), shape, shardings.get(name))
            continue
        wide = functools.partial(read_shard, source, shape, np.dtype(np.float32))
        rounded = RoundedReader(name=name, shape=shape, rule=model.quantise_rule(name), read=wide)
        for part, read in ((name + VALUES, rounded.values), (name + SCALES, rounded.scales)):
            params[part] = _place(read, abstract[part].shape, shardings.get(part))
    return unflatten_named(params), digest


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


class Source(NamedTuple):
    """Where a parameter comes from: a tensor for each index of its first axes (layers, experts), in their order.

    stacked: how many these axes are. transposed: the others are stored as [d_out, d_in].
    """

    tensors: list[StoredTensor | BlockScaled]
    stacked: int
    transposed: bool


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


def _digest(
    directory: Path, config: ModelConfig, tensors: Mapping[str, StoredTensor], sources: Mapping[str, Source]
) -> str:
    stored = [part for source in sources.values() for tensor in source.tensors for part in tensor.stored]
    with ThreadPoolExecutor() as pool:  # reading and hashing both let other threads run
        hashes = dict(zip([tensor.name for tensor in stored], pool.map(StoredTensor.sha256, stored), strict=True))
    if config.tied_embeddings and {EMBEDDING, HEAD} <= set(tensors) and tensors[HEAD].sha256() != hashes[EMBEDDING]:
        raise CheckpointError(
            f"{directory}: {CONFIG} says tie_word_embeddings, but {HEAD} and {EMBEDDING} differ; "
            "set tie_word_embeddings to false, or remove the one that is not meant"
        )
    return digest_records((TensorRecord(t.name, t.dtype, t.shape, hashes[t.name]) for t in stored), config)


def _place(
    read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], sharding: NamedSharding | None
) -> jax.Array:
    """The parameter on its devices. One shard's buffer exists at a time: it is dropped once it is on the device.

    read(index): this part of the parameter.
    """
    whole = (slice(None),) * len(shape)
    if sharding is None:
        return jax.block_until_ready(jax.device_put(read(whole)))
    shards = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        buffer = read(index or whole)
        shards.append(jax.block_until_ready(jax.device_put(buffer, device)))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def read_shard(source: Source, shape: tuple[int, ...], dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """params[index] of one parameter of this shape, in this dtype: kernels turned to [d_in, d_out], layers stacked.

    Only the tensors of the layers and experts in the index are opened.
    """
    bounds = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    buffer = np.empty([len(part) for part in bounds], dtype)
    inner = tuple(slice(part.start, part.stop) for part in bounds[source.stacked :])
    numbers = np.arange(len(source.tensors)).reshape(shape[: source.stacked])
    for at, position in enumerate(itertools.product(*bounds[: source.stacked])):
        tensor, target = source.tensors[int(numbers[position])], buffer.reshape(-1, *buffer.shape[source.stacked :])[at]
        if source.transposed:
            _copy_transposed(target, tensor.read(inner[::-1]))
        else:
            target[...] = tensor.read(inner)
    return buffer


def _copy_transposed(target: np.ndarray, stored: np.ndarray) -> None:
    for start in range(0, stored.shape[0], STRIP):
        target[:, start : start + STRIP] = stored[start : start + STRIP].T
