"""A real pretrained Llama, in llama2.c's legacy files, against the text its authors publish for it."""

import functools
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from popax.modeling.cache import init_cache
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from tests.shared_data import SHARED, needs_shared

DATA = SHARED / "stories260k"
PUBLISHED_STEPS = 256


def read_checkpoint(path: Path) -> tuple[ModelConfig, dict]:
    """(config, params) of a legacy file: 7 int32, then float32 tensors, kind by kind; matrices are [d_out, d_in]."""
    data = path.read_bytes()
    embed, ffw, layers, heads, kv_heads, vocab, seq_len = struct.unpack("7i", data[:28])
    head = embed // heads
    config = ModelConfig(
        vocab_size=abs(vocab),
        embed_dim=embed,
        ffw_dim=ffw,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head,
        rope_layout="interleaved",
        norm_eps=1e-5,
        tied_embeddings=vocab > 0,
        max_seq_len=seq_len,
    )
    values = np.frombuffer(data, np.float32, offset=28)
    start = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal start
        start += int(np.prod(shape))
        return values[start - int(np.prod(shape)) : start].reshape(shape)

    def kernel(d_in: int, d_out: int) -> dict:
        return {"kernel": np.ascontiguousarray(take(layers, d_out, d_in).swapaxes(1, 2))}

    params = {"embed": {"embedding": take(abs(vocab), embed)}, "layers": {"attn": {}, "mlp": {}}}
    attn, mlp = params["layers"]["attn"], params["layers"]["mlp"]
    params["layers"]["attn_norm"] = {"scale": take(layers, embed)}
    attn["q_proj"] = kernel(embed, heads * head)
    attn["k_proj"] = kernel(embed, kv_heads * head)
    attn["v_proj"] = kernel(embed, kv_heads * head)
    attn["o_proj"] = kernel(heads * head, embed)
    params["layers"]["mlp_norm"] = {"scale": take(layers, embed)}
    mlp["gate_proj"] = kernel(embed, ffw)
    mlp["down_proj"] = kernel(ffw, embed)
    mlp["up_proj"] = kernel(embed, ffw)
    params["final_norm"] = {"scale": take(embed)}
    take(2, seq_len, head // 2)  # tables of cos and sin, which follow from the config
    if vocab < 0:
        params["lm_head"] = {"kernel": np.ascontiguousarray(take(-vocab, embed).T)}
    assert start == len(values)
    return config, params


def read_tokenizer(path: Path, vocab_size: int) -> list[bytes]:
    """The bytes each token stands for: int32 longest, then (float32 score, int32 length, bytes) a token."""
    data, pieces, start = path.read_bytes(), [], 4
    for _ in range(vocab_size):
        _, length = struct.unpack_from("fi", data, start)
        piece = data[start + 8 : start + 8 + length]
        start += 8 + length
        is_byte = piece.startswith(b"<0x") and piece.endswith(b">") and len(piece) == 6
        pieces.append(bytes([int(piece[3:5], 16)]) if is_byte else piece)
    return pieces


def decode(tokens: list[int], pieces: list[bytes]) -> str:
    """The text after BOS (token 1), up to the next BOS; the first piece loses its leading space."""
    end = tokens.index(1, 1) if 1 in tokens[1:] else len(tokens)
    text = b"".join(pieces[token] for token in tokens[1:end])
    return text.removeprefix(b" ").decode("utf-8")


@functools.partial(jax.jit, static_argnums=(0, 2))
def greedy(model, params, steps):
    """Tokens after BOS, one at a time through the cache."""

    def step(carry, position):
        token, cache = carry
        x_BxTxD, cache = model.hidden(params, token, positions_BxT=position[None, None], cache=cache)
        following = jnp.argmax(model.logits(params, x_BxTxD), axis=-1).astype(jnp.int32)
        return (following, cache), following[0, 0]

    start = (jnp.ones((1, 1), jnp.int32), init_cache(model.config, 1, steps))
    return jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.int32))[1]


@needs_shared("stories260k")
def test_the_published_greedy_story_is_reproduced_in_full():
    config, params = read_checkpoint(DATA / "stories260K.bin")
    model = Model(config)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.abstract())
    published = (DATA / "published_greedy.txt").read_text(encoding="utf-8").removesuffix("\n")
    tokens = greedy(model, jax.tree.map(jnp.asarray, params), PUBLISHED_STEPS)
    pieces = read_tokenizer(DATA / "tok512.bin", config.vocab_size)
    assert decode([1, *map(int, tokens)], pieces) == published
