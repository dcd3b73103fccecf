"""A base whose own weights hold an adapter: another base, with another digest."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from popax.adapters.compose import compose
from popax.errors import BaseMismatchError, ComposeError, NonFiniteError
from popax.modeling.base import Base, new_base
from popax.modeling.model import Model
from popax.store.catalog import Catalog
from popax.store.compose import Term, part_of
from popax.trees import flatten_named, unflatten_named
from popax.types import Params


def merged_base(catalog: Catalog, base: Base, terms: Sequence[Term]) -> Base:
    """The base with these revisions' weighted sum in its weights: what it computes is what base and adapters compute.

    One revision of weight 1 may be of any method that changes weights; sums are those of `popax.adapters.compose`.
    Raises BaseMismatchError for another base's adapter; NonFiniteError where a weight would not be finite; ComposeError
    where there is nothing to merge, and where an adapter gives a site a bias that the base has no place for, and of a
    method that changes no weight.
    """
    if not terms:
        raise ComposeError("there is no adapter to merge")
    for manifest, _ in terms:
        if manifest.base_digest != base.digest:
            raise BaseMismatchError(
                f"{manifest.shown} was made for the base {manifest.base_digest}, this one is {base.digest}: give that "
                "base, or migrate the adapter first"
            )
    parts = [part_of(catalog, term) for term in terms]
    cohort, adapter, shared, _ = parts[0]
    if len(parts) > 1 or parts[0].weight != 1.0:
        cohort, adapter, _ = compose(parts, "cat")
        shared = {}
    if not cohort.merges:
        raise ComposeError(f"method={cohort.config.method!r} changes no weight: serve it as an adapter")
    adapter, shared = jax.tree.map(jnp.asarray, (adapter, shared))
    params = base.params
    for site in cohort.specs:
        weight, old = base.model.site_weight(params, site), base.model.site_bias(params, site)
        weight, bias = cohort.merge(site, weight, adapter, shared, old)
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((weight, bias))):
            names = ", ".join(manifest.shown for manifest, _ in terms)
            raise NonFiniteError(
                f"{names}: the weight of {site} would hold what is not a finite number in {weight.dtype.name}: mend "
                "the adapter, give it less weight, or merge into a base with a wider param_dtype",
                [manifest.user for manifest, _ in terms],
            )
        params = base.model.with_site_weight(params, site, weight)
        if bias is not None:
            params = _with_bias(base.model, params, site, bias)
    named = " + ".join(f"{weight:g}*{manifest.shown}" for manifest, weight in terms)
    return new_base(base.model, params, source=f"{base.source} with {named}")


def _with_bias(model: Model, params: Params, site: str, bias: jax.Array) -> Params:
    flat, name = flatten_named(params), model.weight_name(site).removesuffix("kernel") + "bias"
    if name not in flat:
        raise ComposeError(
            f"the adapter gives {site} a bias, and this base has no place for one: serve it as an adapter"
        )
    return unflatten_named({**flat, name: bias.astype(flat[name].dtype)})
