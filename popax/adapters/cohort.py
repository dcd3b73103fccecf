"""A cohort: one AdapterConfig resolved on one model. It makes, applies, merges and measures its users' adapters.

An adapter is {site: {leaf: [L, ...]}} for one user, no L at a site outside the layer stack. Where the method ties sites
to groups, it is {TIED: {leaf: [G, ...]}}.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.base import AdapterConfig, SiteSpec, resolve
from popax.adapters.checks import check_experts
from popax.adapters.method import TIED, AdapterMethod, SiteBase, SiteDims
from popax.adapters.table import method_of, options_of
from popax.adapters.tied import groups_of
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

        ConfigError too where the method has no form at routed experts, or dropout none (at what comes out of experts),
        and where it ties more groups than there are sites.
        """
        method = method_of(config)
        specs = resolve(config, sites, width=method.width, scaled=method.scaled, kind=method.kind)
        check_experts(config, method, specs)
        cohort = cls(config, tuple(specs.values()))
        if method.tied:
            cohort._groups  # noqa: B018 - raises where they do not fit
        return cohort

    @functools.cached_property
    def method(self) -> AdapterMethod:
        return method_of(self.config)

    @functools.cached_property
    def options(self) -> Any:
        """The method's own options."""
        return options_of(self.config)

    @property
    def specs(self) -> dict[str, SiteSpec]:
        return {spec.info.name: spec for spec in self.sites}

    @property
    def layered(self) -> dict[str, bool]:
        """The entries of an adapter, and whether their leaves have an L first: its sites, or TIED alone."""
        return {TIED: False} if self.method.tied else {spec.info.name: bool(spec.info.layers) for spec in self.sites}

    @property
    def starts_at_base(self) -> bool:
        """Whether a fresh adapter's output is exactly the base's."""
        return self.method.inits[self.config.init]

    @property
    def adds(self) -> bool:
        """Whether deltas are products with x, so that weighted sums of its users' adapters are sums of deltas."""
        return self.method.factors is not None

    @property
    def merges(self) -> bool:
        """Whether an adapter is a change of weights, which `merge` makes."""
        return self.adds or self.method.merge is not None

    @property
    def virtual_tokens(self) -> int:
        """How many a user's prompt has, in front of every text (popax.modeling.virtual)."""
        return sum(spec.rank for spec in self.sites if spec.info.kind == "embedding")

    @property
    def memory(self) -> int:
        """How many numbers an adapter remembers of a text at each layer (popax.adapters.memory); 0 for none."""
        form = self.method.memory
        return 0 if form is None else form.width(max(spec.rank for spec in self.sites))

    def shared(
        self, weight: Callable[[str], jax.Array], bias: Callable[[str], jax.Array | None] = lambda site: None
    ) -> AdapterState:
        """The frozen arrays all users share, from the base's weights: weight(site) -> [L, D, F] or [D, F].

        bias(site) -> [L, F] or [F], None where the base has none; a caller whose base has biases gives them.
        """

        def at_site(spec: SiteSpec) -> dict[str, jax.Array]:
            name, layers = spec.info.name, spec.info.layers
            hidden = spec.info.kind == "hidden"  # without a weight
            w = jnp.zeros((layers, 0, 0)) if hidden else weight(name)
            b = _or_zeros(None if hidden else bias(name), w, spec)
            key = jax.random.key(zlib.crc32(name.encode()))
            one = lambda mask_R, base: self.method.shared(self._dims(spec), mask_R, base, self.options)  # noqa: E731
            if not layers:
                return one(_mask(spec)[0], SiteBase(key, w, b, scales(spec)))
            # One layer at a time: a decomposition's workspace is then one matrix, not the stack.
            bases = SiteBase(jax.random.split(key, layers), w, b, scales(spec))
            return jax.lax.map(lambda operands: one(*operands), (_mask(spec), bases))

        if not self.method.shared_axes:
            return {}
        with jax.default_matmul_precision("highest"):
            return {spec.info.name: at_site(spec) for spec in self.sites}

    def init(self, key: jax.Array) -> AdapterState:
        """A fresh adapter for one user."""
        dtype, method = jnp.dtype(self.config.dtype), self.method

        def at_site(site_key: jax.Array, spec: SiteSpec) -> dict[str, jax.Array]:
            keys = jax.random.split(site_key, len(spec.ranks))
            one = lambda key, mask_R: method.init(key, self._dims(spec), mask_R, self.config, self.options)  # noqa: E731
            leaves = jax.vmap(one)(keys, _mask(spec))
            return leaves if spec.info.layers else jax.tree.map(lambda leaf: leaf[0], leaves)

        with jax.default_matmul_precision("highest"):
            if method.tied:
                state = {TIED: method.init(key, self.config, self.options)}
            else:
                keys = jax.random.split(key, len(self.sites))
                state = {spec.info.name: at_site(keys[index], spec) for index, spec in enumerate(self.sites)}
        return jax.tree.map(lambda leaf: leaf.astype(dtype), state)

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
        if self.method.tied and not shared:
            return {TIED: dict(table)}

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

    def spread(self, adapter: AdapterState, *, slots: bool = False) -> AdapterState:
        """What each site sees of an adapter: {site: {leaf: [L, ...]}}, without L outside the layer stack.

        Where the method ties sites, each takes its group's leaves; elsewhere this is the adapter as it is. slots:
        leaves have a slot axis, after L where there is one, as `bind_slots` takes them.
        """
        if not self.method.tied:
            return adapter

        def at_site(spec: SiteSpec) -> dict[str, jax.Array]:
            groups = self._groups[spec.info.name]
            take = lambda leaf: leaf[:, groups].swapaxes(0, 1) if slots else leaf[groups]  # noqa: E731
            leaves = jax.tree.map(lambda leaf: take(leaf), adapter[TIED])
            return leaves if spec.info.layers else jax.tree.map(lambda leaf: leaf[0], leaves)

        return {spec.info.name: at_site(spec) for spec in self.sites}

    @functools.cached_property
    def _groups(self) -> dict[str, np.ndarray]:
        return groups_of(self.sites, self.options.groups)

    def refreshed(
        self, adapter: AdapterState, shared: AdapterState, weight: Callable[[str], jax.Array]
    ) -> AdapterState:
        """The adapter with what its method derives from its other leaves computed anew; weight as in `shared`."""
        if self.method.refresh is None:
            return adapter
        fresh = {}
        with jax.default_matmul_precision("highest"):
            for name, spec in self.specs.items():
                w = weight(name) if spec.info.kind == "linear" else None
                operands = (adapter[name], shared.get(name, {}), scales(spec), w)
                fresh[name] = _over_layers(self.method.refresh, spec, *operands)
        return adapter | fresh

    def merge(
        self,
        name: str,
        w: jax.Array,
        adapter: AdapterState,
        shared: AdapterState,
        bias: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """(W', bias') of one site, whose output is the adapter's; W + s A^T B where the method has factors.

        w: [L, D, F] or [D, F], with an E before D at experts; bias: [L, F] or [F]. Their dtypes stay. bias' is None
        where the base has no bias and the method makes none.
        """
        spec, method = self.specs[name], self.method
        if not self.merges:
            raise ConfigError(f"method={self.config.method!r} changes no weight: there is nothing to merge")
        leaves, common = self._wide(self.spread(adapter)[name]), self._wide(shared.get(name, {}))

        def product(w_DxF, scale, leaves, common):
            a_RxD, b_RxF = self._factors(leaves, common)
            return w_DxF.astype(jnp.float32) + scale * jnp.matmul(a_RxD.mT, b_RxF, precision=EXACT)

        with jax.default_matmul_precision("highest"):
            if method.merge is None:
                return _over_layers(product, spec, w, scales(spec), leaves, common).astype(w.dtype), bias
            b = _or_zeros(bias, w, spec)
            wide = (w.astype(jnp.float32), b.astype(jnp.float32))
            merged, offset = _over_layers(method.merge, spec, leaves, common, scales(spec), *wide)
        made = bias is not None or method.makes_bias
        return merged.astype(w.dtype), offset.astype(b.dtype) if made else None

    def norms(self, adapter: AdapterState, shared: AdapterState) -> dict[str, jax.Array]:
        """Frobenius norm of each site's delta, [L] or scalar, over all experts where it has some.

        ||s A^T B||_F = s sqrt(<A A^T, B B^T>) where the method has factors.
        """

        def product(leaves, common, scale):
            a_RxD, b_RxF = self._factors(leaves, common)
            aa_RxR, bb_RxR = (jnp.matmul(each, each.mT, precision=EXACT) for each in (a_RxD, b_RxF))
            return jnp.abs(scale) * jnp.sqrt(jnp.maximum(jnp.sum(aa_RxR * bb_RxR), 0.0))

        one, seen = self.method.norm or product, self._wide(self.spread(adapter))
        with jax.default_matmul_precision("highest"):
            return {
                name: _over_layers(one, spec, seen[name], self._wide(shared.get(name, {})), scales(spec))
                for name, spec in self.specs.items()
            }

    def factors(self, name: str, adapter: AdapterState, shared: AdapterState) -> tuple[jax.Array, jax.Array]:
        """(A [L, R, D], B [L, R, F]) in float32, without L outside the stack: the delta's weight is s A^T B.

        At experts, the factor on their own side has an E after L. Raises ConfigError where the method's delta is no
        such product.
        """
        if self.method.factors is None:
            raise ConfigError(f"method={self.config.method!r}: its change of a weight is no product of two factors")
        leaves, common = self._wide(self.spread(adapter)[name]), self._wide(shared.get(name, {}))
        with jax.default_matmul_precision("highest"):
            return _over_layers(self.method.factors, self.specs[name], leaves, common)

    def rates(self) -> dict[str, float]:
        """Factors on the learning rates of leaves, by their names, where they are not 1."""
        return {leaf: rate for leaf, rate in self.method.rates(self.options).items() if rate != 1.0}

    def _factors(self, leaves: dict[str, jax.Array], common: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """A and B of one layer, both with the experts' axis where one has it."""
        assert self.method.factors is not None
        a_RxD, b_RxF = self.method.factors(leaves, common)
        lead = jnp.broadcast_shapes(a_RxD.shape[:-2], b_RxF.shape[:-2])
        return jnp.broadcast_to(a_RxD, (*lead, *a_RxD.shape[-2:])), jnp.broadcast_to(b_RxF, (*lead, *b_RxF.shape[-2:]))

    def _wide(self, tree: Any) -> Any:
        """What is merged or measured is computed once and kept: float32 whatever the adapter's own dtype is."""
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def _dims(self, spec: SiteSpec) -> SiteDims:
        widest = (max(each.info.d_in for each in self.sites), max(each.info.d_out for each in self.sites))
        info = spec.info
        return SiteDims(info.d_in, info.d_out, spec.rank, info.experts, info.hidden_side, *widest)


def scales(spec: SiteSpec) -> jax.Array:
    """The scale at each layer, [L], or a scalar outside the layer stack."""
    return jnp.asarray(spec.scales if spec.info.layers else spec.scales[0], dtype=jnp.float32)


def _or_zeros(bias: jax.Array | None, w: jax.Array, spec: SiteSpec) -> jax.Array:
    """A site's bias, [L, F] or [F], where the base has one."""
    return jnp.zeros((*w.shape[: bool(spec.info.layers)], w.shape[-1])) if bias is None else bias


def _over_layers(one: Callable[..., Any], spec: SiteSpec, *operands: Any) -> Any:
    return jax.vmap(one)(*operands) if spec.info.layers else one(*operands)


def _mask(spec: SiteSpec) -> jax.Array:
    ranks_Lx1 = jnp.asarray(spec.ranks)[:, None]
    return (jnp.arange(spec.rank)[None, :] < ranks_Lx1).astype(jnp.float32)
