"""A Hugging Face directory of random weights in many files, written in little memory: something to load."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from popax.errors import ConfigError
from popax.modeling import hf
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.modeling.tensor_files import DTYPES, INDEX
from popax.trees import flatten_named

# Random numbers are drawn once; every tensor is a stretch of them that begins elsewhere.
BLOCK_ELEMENTS = 1 << 23
SCALE = 0.02
STORED = {"bfloat16": "BF16", "float32": "F32"}


def write_random_weights(directory: Path, config: ModelConfig, *, file_bytes: int, seed: int = 0) -> int:
    """Write a directory of this shape in files of about file_bytes; returns how many. Raises ConfigError unless the
    config is a dense Qwen3's."""
    if not config.qk_norm or config.moe is not None or config.rope_scaling is not None:
        raise ConfigError(
            "random weights are written in Qwen3's format: a dense model with qk_norm and without rope_scaling, such "
            "as configs/models/qwen3_8b.gin"
        )
    directory.mkdir(parents=True, exist_ok=True)
    stored = STORED[config.param_dtype]
    dtype = np.dtype(DTYPES[stored])
    block = (np.random.default_rng(seed).standard_normal(BLOCK_ELEMENTS, np.float32) * SCALE).astype(dtype)
    files = list(_files(config, dtype.itemsize, file_bytes))
    weight_map = {}
    for number, shapes in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(directory / name, shapes, stored, block, start=number * 9973)
        weight_map |= dict.fromkeys(shapes, name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    (directory / hf.CONFIG).write_text(json.dumps(_record(config)), encoding="utf-8")
    return len(files)


def _files(config: ModelConfig, itemsize: int, file_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors of one file after the other, layer by layer, as published checkpoints have them."""
    shapes, nbytes = {}, 0
    for name, shape in sorted(_tensors(config), key=lambda tensor: (_layer(tensor[0]), tensor[0])):
        shapes[name] = shape
        nbytes += int(np.prod(shape)) * itemsize
        if nbytes >= file_bytes:
            yield shapes
            shapes, nbytes = {}, 0
    if shapes:
        yield shapes


def _layer(name: str) -> int:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1


def _tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    model = Model(config)
    for name, like in flatten_named(model.abstract()).items():
        stack = model.stacks.get(name.partition("/")[0])
        shape = like.shape[stack is not None :]
        for layer in range(1 if stack is None else stack.num_layers):
            yield hf.hf_name(name, layer), shape[::-1] if name.endswith("/kernel") else shape


def _write_file(path: Path, shapes: dict[str, tuple[int, ...]], stored: str, block: np.ndarray, start: int) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        nbytes = int(np.prod(shape)) * block.itemsize
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for position, shape in enumerate(shapes.values()):
            left, begin = int(np.prod(shape)), (start + 131 * position) % block.size
            while left:
                part = block[begin : begin + left]
                part.tofile(stream)
                left, begin = left - part.size, 0


def _record(config: ModelConfig) -> dict:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.ffw_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": config.attention_bias,
        "torch_dtype": config.param_dtype,
    }
