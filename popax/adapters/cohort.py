"""A cohort: one AdapterConfig resolved on one model. It makes, applies, merges and measures its users' adapters.

An adapter is {site: {leaf: [L, ...]}} for one user (no L at a site outside the layer stack).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from popax.adapters.base import AdapterConfig, AdapterMethod, SiteDims, SiteSpec, resolve
from popax.adapters.table import METHODS, method_of
from popax.errors import ConfigError
from popax.types import AdapterState, SiteInfo

EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Static and hashable: what users with equal configs have in common, apart from arrays."""

    config: AdapterConfig
    sites: tuple[SiteSpec, ...]

    @classmethod
    def of(cls, config: AdapterConfig, sites: Mapping[str, SiteInfo]) -> "Cohort":
        """Resolve the config's targets on a model's sites. Raises SiteError and ConfigError as `resolve` does.

        ConfigError too where the method has no form at routed experts, or dropout none (at what comes out of experts).
        """
        method_of(config)
        specs = resolve(config, sites)
        _check_experts(config, specs)
        return cls(config, tuple(specs.values()))

    @property
    def method(self) -> AdapterMethod:
        return method_of(self.config)

    @property
    def specs(self) -> dict[str, SiteSpec]:
        return {spec.info.name: spec for spec in self.sites}

    @property
    def starts_at_base(self) -> bool:
        """Whether a fresh adapter's output is exactly the base's."""
        return self.method.inits[self.config.init]

    def shared(self, weight: Callable[[str], jax.Array]) -> AdapterState:
        """The frozen arrays all users share, from the base's weights: weight(site) -> [L, D, F] or [D, F]."""

        def at_site(spec: SiteSpec) -> dict[str, jax.Array]:
            one = lambda mask_R, w_DxF: self.method.shared(_dims(spec), mask_R, w_DxF)  # noqa: E731
            if not spec.info.layers:
                return one(_mask(spec)[0], weight(spec.info.name))
            # One layer at a time: a decomposition's workspace is then one matrix, not the stack.
            return jax.lax.map(lambda operands: one(*operands), (_mask(spec), weight(spec.info.name)))

        shared = {spec.info.name: at_site(spec) for spec in self.sites}
        return {name: leaves for name, leaves in shared.items() if leaves}

    def init(self, key: jax.Array) -> AdapterState:
        """A fresh adapter for one user."""
        dtype = jnp.dtype(self.config.dtype)

        def at_site(site_key: jax.Array, spec: SiteSpec) -> dict[str, jax.Array]:
            keys = jax.random.split(site_key, len(spec.ranks))
            one = lambda key, mask_R: self.method.init(key, _dims(spec), mask_R, self.config)  # noqa: E731
            leaves = jax.vmap(one)(keys, _mask(spec))
            leaves = leaves if spec.info.layers else jax.tree.map(lambda leaf: leaf[0], leaves)
            return jax.tree.map(lambda leaf: leaf.astype(dtype), leaves)

        keys = jax.random.split(key, len(self.sites))
        return {spec.info.name: at_site(keys[index], spec) for index, spec in enumerate(self.sites)}

    def abstract(self) -> Any:
        """The shapes and dtypes of one user's adapter."""
        return jax.eval_shape(self.init, jax.random.key(0))

    @property
    def num_params(self) -> int:
        """Numbers one user owns, columns beyond a layer's rank included."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract()))

    def axes(self, *, shared: bool = False) -> dict[str, dict[str, tuple[str, ...]]]:
        """Logical axes of each leaf, taken from the base weight's own."""
        table = self.method.shared_axes if shared else self.method.state_axes

        def at_site(info: SiteInfo) -> dict[str, tuple[str, ...]]:
            names = {"in": info.axes[0], "out": info.axes[1]}
            lead, own_side = (
                ("layers",) if info.layers else (),
                {"in": "out", "out": "in", None: None}[info.hidden_side],
            )
            experts = {leaf: ("expert",) if own_side in axes else () for leaf, axes in table.items()}
            return {
                leaf: (*lead, *experts[leaf], *(names.get(axis, axis) for axis in axes)) for leaf, axes in table.items()
            }

        return {spec.info.name: at_site(spec.info) for spec in self.sites if table}

    def merge(self, name: str, w: jax.Array, adapter: AdapterState, shared: AdapterState) -> jax.Array:
        """W' = W + s A^T B at one site, for [L, D, F] or [D, F], with an E before D at experts; the dtype stays W's."""
        spec = self.specs[name]

        def one(w_DxF, scale, leaves, common):
            a_RxD, b_RxF = _each_expert(*self._factors(leaves, common))
            delta_DxF = jnp.matmul(a_RxD.mT, b_RxF, precision=EXACT)
            return (w_DxF.astype(jnp.float32) + scale * delta_DxF).astype(w_DxF.dtype)

        return _over_layers(one, spec, w, scales(spec), adapter[name], shared.get(name, {}))

    def norms(self, adapter: AdapterState, shared: AdapterState) -> dict[str, jax.Array]:
        """Frobenius norm of each site's delta, [L] or scalar, over all experts where it has some.

        ||s A^T B||_F = s sqrt(<A A^T, B B^T>).
        """

        def one(scale, leaves, common):
            a_RxD, b_RxF = _each_expert(*self._factors(leaves, common))
            aa_RxR = jnp.matmul(a_RxD, a_RxD.mT, precision=EXACT)
            bb_RxR = jnp.matmul(b_RxF, b_RxF.mT, precision=EXACT)
            return jnp.abs(scale) * jnp.sqrt(jnp.maximum(jnp.sum(aa_RxR * bb_RxR), 0.0))

        return {
            spec.info.name: _over_layers(
                one, spec, scales(spec), adapter[spec.info.name], shared.get(spec.info.name, {})
            )
            for spec in self.sites
        }

    def factors(self, name: str, adapter: AdapterState, shared: AdapterState) -> tuple[jax.Array, jax.Array]:
        """(A [L, R, D], B [L, R, F]) in float32, without L outside the stack: the delta's weight is s A^T B.

        At experts, the factor on their own side has an E after L.
        """
        return _over_layers(self._factors, self.specs[name], adapter[name], shared.get(name, {}))

    def _factors(self, leaves: dict[str, jax.Array], common: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # What is merged or measured is computed once and kept: float32 whatever the adapter's own dtype is.
        leaves, common = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (leaves, common))
        with jax.default_matmul_precision("highest"):
            return self.method.factors(leaves, common)


def scales(spec: SiteSpec) -> jax.Array:
    """The scale at each layer, [L], or a scalar outside the layer stack."""
    return jnp.asarray(spec.scales if spec.info.layers else spec.scales[0], dtype=jnp.float32)


def _over_layers(one: Callable[..., Any], spec: SiteSpec, *operands: Any) -> Any:
    return jax.vmap(one)(*operands) if spec.info.layers else one(*operands)


def _dims(spec: SiteSpec) -> SiteDims:
    return SiteDims(spec.info.d_in, spec.info.d_out, spec.rank, spec.info.experts, spec.info.hidden_side)


def _each_expert(a_RxD: jax.Array, b_RxF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both factors with the experts' axis, where one has it."""
    lead = jnp.broadcast_shapes(a_RxD.shape[:-2], b_RxF.shape[:-2])
    return jnp.broadcast_to(a_RxD, (*lead, *a_RxD.shape[-2:])), jnp.broadcast_to(b_RxF, (*lead, *b_RxF.shape[-2:]))


def _check_experts(config: AdapterConfig, specs: Mapping[str, SiteSpec]) -> None:
    routed = [name for name, spec in specs.items() if spec.info.experts]
    if routed and METHODS[config.method].experts is None:
        able = ", ".join(name for name, method in METHODS.items() if method.experts is not None)
        raise ConfigError(
            f"method={config.method!r} has no form at routed experts ({', '.join(routed)}): leave them out of the "
            f"targets, or use a method that has one ({able})"
        )
    after = [name for name in routed if specs[name].info.hidden_side == "out"]
    if after and config.dropout:
        raise ConfigError(
            f"dropout={config.dropout} at {', '.join(after)}: the features inside routed experts cannot be dropped: "
            "set dropout to 0, or give these targets rank 0"
        )


def _mask(spec: SiteSpec) -> jax.Array:
    ranks_Lx1 = jnp.asarray(spec.ranks)[:, None]
    return (jnp.arange(spec.rank)[None, :] < ranks_Lx1).astype(jnp.float32)
