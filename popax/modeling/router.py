"""Which experts a token goes to, and with which weights (softmax top-k; DeepSeek-V3's bias-corrected groups)."""

import jax
import jax.numpy as jnp
from flax import nnx

from popax.modeling.block_config import MoEConfig
from popax.modeling.layers import Linear
from popax.types import NOT_RECORDED


class Router(Linear):
    """The linear map to a logit for each expert, in float32: which expert is best must not hang on rounding.

    correction_bias is float32 as well, whatever the other weights are: it is added to scores that differ by little.
    """

    def __init__(self, site: str, embed_dim: int, config: MoEConfig, *, param_dtype: str, rngs: nnx.Rngs):
        shape, options = (embed_dim, config.num_experts), {"param_dtype": param_dtype, "rngs": rngs}
        super().__init__(site, shape, ("embed", "router"), bias=False, **options)
        bias = nnx.Param(jnp.zeros(config.num_experts, jnp.float32), axes=("router",))
        self.correction_bias = bias if config.correction_bias else None
        self.config = config

    def product(self, x: jax.Array) -> jax.Array:
        wide, kernel_DxE = x.astype(jnp.float32), self.matrix(jnp.float32)
        return jnp.einsum("...d,de->...e", wide, kernel_DxE, precision=jax.lax.Precision.HIGHEST)

    def choose(self, logits_MxE: jax.Array, recorded_MxK: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """(experts int32 [M, K], their weights float32 [M, K]).

        recorded_MxK: experts that take the place of the choice; the weights are still those of these logits. Where it
        is NOT_RECORDED the choice is the router's own.
        """
        scores_MxE = scores(logits_MxE, self.config)
        bias_E = None if self.correction_bias is None else self.correction_bias[...]
        expert_MxK = select(scores_MxE, bias_E, self.config)
        if recorded_MxK is not None:
            expert_MxK = jnp.where(recorded_MxK == NOT_RECORDED, expert_MxK, recorded_MxK.astype(jnp.int32))
        return expert_MxK, combination_weights(scores_MxE, expert_MxK, self.config)


def scores(logits_MxE: jax.Array, config: MoEConfig) -> jax.Array:
    """softmax over all experts, or a sigmoid for each; float32."""
    logits_MxE = logits_MxE.astype(jnp.float32)
    return jax.nn.softmax(logits_MxE, axis=-1) if config.scoring == "softmax" else jax.nn.sigmoid(logits_MxE)


def select(scores_MxE: jax.Array, bias_E: jax.Array | None, config: MoEConfig) -> jax.Array:
    """The K experts of highest score (plus bias) in the groups whose two best sum highest, int32 [M, K].

    arXiv 2412.19437, section 2.1.2. No gradient goes through a choice.
    """
    ranked_MxE = jax.lax.stop_gradient(scores_MxE)
    if bias_E is not None:
        ranked_MxE = ranked_MxE + jax.lax.stop_gradient(bias_E)[None]
    if config.num_groups > 1:
        ranked_MxGxe = ranked_MxE.reshape(ranked_MxE.shape[0], config.num_groups, -1)
        group_MxG = jnp.sum(_largest(ranked_MxGxe, 2)[0], axis=-1)
        chosen_Mxg = _largest(group_MxG, config.top_groups)[1]
        allowed_MxG = jnp.any(chosen_Mxg[:, :, None] == jnp.arange(config.num_groups)[None, None], axis=1)
        ranked_MxE = jnp.where(allowed_MxG[..., None], ranked_MxGxe, -jnp.inf).reshape(ranked_MxE.shape)
    return _largest(ranked_MxE, config.experts_per_token)[1]


def _largest(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(the `count` largest values of the last axis, their indices int32), the first of equal ones first.

    One reduction after the other: the compiler's partitioner cuts reductions along with the tokens they are over, but
    gathers all tokens of a mesh on every device for `jax.lax.top_k`.
    """
    numbers = jnp.arange(values.shape[-1], dtype=jnp.int32).reshape((1,) * (values.ndim - 1) + (-1,))
    largest, indices = [], []
    for _ in range(count):
        index = jnp.argmax(values, axis=-1, keepdims=True).astype(jnp.int32)
        largest.append(jnp.max(values, axis=-1, keepdims=True))
        indices.append(index)
        # Groups that are not allowed are at -inf too, and never looked at: the config sees to enough that are.
        values = jnp.where(numbers == index, -jnp.inf, values)
    return jnp.concatenate(largest, axis=-1), jnp.concatenate(indices, axis=-1)


def combination_weights(scores_MxE: jax.Array, expert_MxK: jax.Array, config: MoEConfig) -> jax.Array:
    """The weight of each chosen expert's output: its score (without bias), normalised and scaled as the config says."""
    weight_MxK = jnp.take_along_axis(scores_MxE, expert_MxK, axis=-1)
    if config.normalize_top_k:
        # A sum of sigmoids may be zero; that of a softmax is not, and does not notice.
        weight_MxK = weight_MxK / (jnp.sum(weight_MxK, axis=-1, keepdims=True) + jnp.float32(1e-20))
    return weight_MxK * jnp.float32(config.routed_scaling)
