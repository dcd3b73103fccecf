"""A mixture of experts in place of a dense MLP, with the MLP that every token goes through beside it."""

import math

import jax
from flax import nnx

from popax.modeling.block_config import MoEConfig
from popax.modeling.config import ModelConfig
from popax.modeling.experts import ExpertWeights
from popax.modeling.layers import SwiGLU, normal, project
from popax.modeling.quantise_rules import QuantiseRules
from popax.modeling.quantised import make_kernel, read_kernel
from popax.modeling.routed import routed_experts
from popax.modeling.router import Router
from popax.sharding import ShardingRules
from popax.types import SiteFn


class ExpertLinear(nnx.Module):
    """One matrix for each expert, [E, d_in, d_out]. Not a site: adapters act where all tokens of a user pass."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, int, int],
        axes: tuple[str, str],
        *,
        std: float,
        param_dtype: str,
        rngs: nnx.Rngs,
        quantise: QuantiseRules | None,
    ):
        rule = None if quantise is None else quantise.rule(name)
        self.kernel = make_kernel(normal(rngs, shape, std, param_dtype), ("expert", *axes), rule)


class Experts(nnx.Module):
    """The MLPs among which the router chooses."""

    def __init__(self, name: str, config: ModelConfig, moe: MoEConfig, *, rngs: nnx.Rngs, out_std: float):
        count, embed_dim, ffw = moe.num_experts, config.embed_dim, moe.expert_ffw_dim
        options = {"param_dtype": config.param_dtype, "rngs": rngs, "quantise": config.quantise}
        in_std = 1 / math.sqrt(embed_dim)
        wide, narrow = (count, embed_dim, ffw), (count, ffw, embed_dim)
        self.gate_proj = ExpertLinear(f"{name}.gate_proj", wide, ("embed", "expert_ffw"), std=in_std, **options)
        self.up_proj = ExpertLinear(f"{name}.up_proj", wide, ("embed", "expert_ffw"), std=in_std, **options)
        self.down_proj = ExpertLinear(f"{name}.down_proj", narrow, ("expert_ffw", "embed"), std=out_std, **options)

    @property
    def weights(self) -> ExpertWeights:
        return ExpertWeights(*(read_kernel(part.kernel) for part in (self.gate_proj, self.up_proj, self.down_proj)))


class MoE(nnx.Module):
    """y = sum over the chosen experts of weight * mlp_e(x), plus the shared MLP of x where there is one."""

    def __init__(self, name: str, config: ModelConfig, moe: MoEConfig, *, rngs: nnx.Rngs, shrink: float):
        options = {"param_dtype": config.param_dtype, "rngs": rngs}
        self.router = Router(f"{name}.router", config.embed_dim, moe, **options)
        out_std = shrink / math.sqrt(moe.expert_ffw_dim)
        self.experts = Experts(f"{name}.experts", config, moe, rngs=rngs, out_std=out_std)
        dims, out_std = (config.embed_dim, moe.shared_ffw_dim), shrink / math.sqrt(max(moe.shared_ffw_dim, 1))
        wanted = {"bias": config.mlp_bias, **options, "out_std": out_std, "quantise": config.quantise}
        self.shared = SwiGLU(f"{name}.shared", *dims, **wanted) if moe.shared_ffw_dim else None

    def __call__(
        self, x_BxTxD: jax.Array, site_fn: SiteFn, rules: ShardingRules, routes_BxTxK: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """(y, the experts that each token went to: int32 [B, T, K]). rules: as in Model. routes_BxTxK: as in
        `Router.choose`."""
        shared = () if self.shared is None else self.shared.inner
        logits_BxTxE, *inner_BxTxF = project(x_BxTxD, site_fn, self.router, *shared)
        recorded_MxK = None if routes_BxTxK is None else routes_BxTxK.reshape(-1, routes_BxTxK.shape[-1])
        expert_MxK, weight_MxK = self.router.choose(logits_BxTxE.reshape(-1, logits_BxTxE.shape[-1]), recorded_MxK)
        taken_BxTxK = expert_MxK.reshape(*x_BxTxD.shape[:-1], -1)
        x_MxD = x_BxTxD.reshape(-1, x_BxTxD.shape[-1])
        y_MxD = routed_experts(x_MxD, expert_MxK, weight_MxK, self.experts.weights, rules)
        y_BxTxD = y_MxD.reshape(x_BxTxD.shape)
        if self.shared is None:
            return y_BxTxD, taken_BxTxK
        gate_BxTxF, up_BxTxF = inner_BxTxF
        return y_BxTxD + self.shared.outer(gate_BxTxF, up_BxTxF, site_fn), taken_BxTxK
