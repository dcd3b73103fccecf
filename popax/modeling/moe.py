"""A mixture of experts in place of a dense MLP, with the MLP that every token goes through beside it."""

import math

import jax
from flax import nnx

from popax.modeling.block_config import MoEConfig
from popax.modeling.config import ModelConfig
from popax.modeling.experts import Choice, ExpertWeights, Values
from popax.modeling.layers import SwiGLU, normal, project
from popax.modeling.quantise_rules import QuantiseRules
from popax.modeling.quantised import make_kernel, read_kernel
from popax.modeling.routed import routed_experts
from popax.modeling.router import Router
from popax.sharding import ShardingRules
from popax.types import SiteFn


class ExpertLinear(nnx.Module):
    """One matrix for each expert, [E, d_in, d_out], at one site."""

    def __init__(
        self,
        site: str,
        shape: tuple[int, int, int],
        axes: tuple[str, str],
        *,
        std: float,
        param_dtype: str,
        rngs: nnx.Rngs,
        quantise: QuantiseRules | None,
    ):
        self.site = site
        rule = None if quantise is None else quantise.rule(site)
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

    def __call__(
        self, x_BxTxD: jax.Array, expert_MxK: jax.Array, weight_MxK: jax.Array, site_fn: SiteFn, rules: ShardingRules
    ) -> jax.Array:
        """The sum over a token's experts of weight * mlp_e(x), with what adapters make of them. rules: as in Model."""
        parts = (self.gate_proj, self.up_proj, self.down_proj)
        weights = ExpertWeights(*(read_kernel(part.kernel) for part in parts))
        terms = site_fn.expert_terms(x_BxTxD, (parts[0].site, parts[1].site, parts[2].site))
        x_MxD = x_BxTxD.reshape(-1, x_BxTxD.shape[-1])
        if terms is None:
            outputs = routed_experts(Values(x_MxD, weight_MxK), Choice(expert_MxK), weights, None, rules)
            return outputs.y_MxD.reshape(x_BxTxD.shape)
        flat = lambda leaf: leaf.reshape(x_MxD.shape[0], -1)  # noqa: E731
        slot_Mx1, *lows = jax.tree.map(flat, (terms.slot_BxT, terms.gate_BxTxR, terms.up_BxTxR))
        choice = Choice(expert_MxK, slot_Mx1)
        outputs = routed_experts(Values(x_MxD, weight_MxK, *lows), choice, weights, terms.factors, rules)
        y_BxTxD = outputs.y_MxD.reshape(x_BxTxD.shape)
        if outputs.low_MxQ is None:
            return y_BxTxD
        low_BxTxR = outputs.low_MxQ.reshape(*x_BxTxD.shape[:-1], -1)
        return site_fn.after_experts(self.down_proj.site, low_BxTxR, y_BxTxD)


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
        y_BxTxD = self.experts(x_BxTxD, expert_MxK, weight_MxK, site_fn, rules)
        if self.shared is None:
            return y_BxTxD, taken_BxTxK
        gate_BxTxF, up_BxTxF = inner_BxTxF
        return y_BxTxD + self.shared.outer(gate_BxTxF, up_BxTxF, site_fn), taken_BxTxK
