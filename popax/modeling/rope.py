"""Rotary position embeddings (arXiv 2104.09864), with the scalings of Llama 3.1 and YaRN, in both feature layouts."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from popax.modeling.config import LinearRope, Llama3Rope, ModelConfig, RopeLayout, YarnRope


def frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """(radians per position [rope_dim/2] float32, the factor on cos and sin), computed on the host in float64."""
    exponents = np.arange(0, config.rope_dim, 2, dtype=np.float64) / config.rope_dim
    plain = config.rope_theta**-exponents
    match config.rope_scaling:
        case None:
            scaled, factor = plain, 1.0
        case LinearRope(factor=stretch):
            scaled, factor = plain / stretch, 1.0
        case Llama3Rope() as rope:
            scaled, factor = _llama3(plain, rope), 1.0
        case YarnRope() as rope:
            scaled, factor = _yarn(plain, config, rope), _yarn_attention_factor(rope)
    return scaled.astype(np.float32), factor


def _llama3(plain: np.ndarray, rope: Llama3Rope) -> np.ndarray:
    turns = rope.original_max_seq_len * plain / (2 * math.pi)  # in the original context
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / rope.factor


def _yarn(plain: np.ndarray, config: ModelConfig, rope: YarnRope) -> np.ndarray:
    def feature(turns: float) -> float:
        """The (fractional) pair that turns this often in the original context."""
        wavelength = rope.original_max_seq_len / turns
        return config.rope_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = feature(rope.beta_fast), feature(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rope_dim - 1)
    width = high - low if high != low else 0.001
    stretched = np.clip((np.arange(len(plain)) - low) / width, 0.0, 1.0)
    return stretched * plain / rope.factor + (1 - stretched) * plain


def yarn_scale(factor: float, multiplier: float) -> float:
    """YaRN's growth of attention with the stretch: 0.1 m ln(factor) + 1 (arXiv 2309.00071, equation 22)."""
    return 0.1 * multiplier * math.log(factor) + 1.0


def _yarn_attention_factor(rope: YarnRope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_scale(rope.factor, rope.mscale) / yarn_scale(rope.factor, rope.mscale_all_dim)
    return yarn_scale(rope.factor, 1.0)


def cos_sin(config: ModelConfig, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position's angles, float32 [B, T, 1, rope_dim/2]: the 1 broadcasts over heads."""
    radians, factor = frequencies(config)
    angles = positions_BxT.astype(jnp.float32)[:, :, None, None] * radians[None, None, None, :]
    scale = jnp.float32(factor)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x_BxTxHxd: jax.Array, cos: jax.Array, sin: jax.Array, layout: RopeLayout) -> jax.Array:
    """Each pair of features turned by its position's angle, in float32; the result has x's dtype."""
    x = x_BxTxHxd.astype(jnp.float32)
    if layout == "half":
        first, second = jnp.split(x, 2, axis=-1)
        turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    else:
        first, second = x[..., 0::2], x[..., 1::2]
        turned = jnp.stack((first * cos - second * sin, second * cos + first * sin), axis=-1).reshape(x.shape)
    return turned.astype(x_BxTxHxd.dtype)
