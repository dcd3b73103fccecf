"""What changed from one revision to another: its record, and its weights."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.cohort import Cohort
from popax.store.catalog import Catalog
from popax.store.manifest import Manifest
from popax.store.pointers import Which
from popax.types import AdapterState

# Different in every two revisions, and said by their names already.
_LEFT_OUT = ("revision", "row", "shard", "created")
NAN = float("nan")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteChange:
    """How a site's weight update W = s A^T B changed, over all its layers.

    before, after: ||W||_F. change: ||W' - W||_F. cosine: <W, W'> / (||W|| ||W'||), NaN where one of them is zero. A
    method whose update is no product of factors has norms alone: change and cosine are NaN.
    """

    site: str
    before: float
    after: float
    change: float
    cosine: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Two revisions. fields: what differs in their manifests, {name: (before, after)}. sites: none where the two are
    of different cohorts, whose weight updates are of different bases or shapes."""

    before: Manifest
    after: Manifest
    fields: Mapping[str, tuple[Any, Any]]
    sites: tuple[SiteChange, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "fields": {name: list(pair) for name, pair in self.fields.items()},
            "sites": [dataclasses.asdict(site) for site in self.sites],
        }


def difference(catalog: Catalog, user: str, before: Which, after: Which) -> Difference:
    """What changed between two of the user's revisions. Errors as `Catalog.load`."""
    (old, one), (new, other) = (catalog.load(user, which) for which in (before, after))
    sites: list[SiteChange] = []
    if one.cohort == other.cohort:
        stored = catalog.cohort_of(one)
        cohort = Cohort(stored.config, tuple(stored.specs.values()))
        sites = site_changes(cohort, catalog.shared(stored), old, new)
    return Difference(before=one, after=other, fields=changed_fields(one, other), sites=tuple(sites))


def changed_fields(before: Manifest, after: Manifest) -> dict[str, tuple[Any, Any]]:
    """The manifests' entries that differ; those of nested records under names like metrics.loss."""
    one, other = _flat(before), _flat(after)
    names = [name for name in sorted(one | other) if one.get(name) != other.get(name)]
    return {name: (one.get(name), other.get(name)) for name in names}


def site_changes(cohort: Cohort, shared: AdapterState, before: AdapterState, after: AdapterState) -> list[SiteChange]:
    """How each site's weight update changed, in float32, without forming a matrix of the weight's size.

    With W = s A^T B, <W, W'> = s^2 sum((A A'^T) * (B B'^T)).
    """
    if not cohort.adds:
        sizes = [cohort.norms(adapter, shared) for adapter in (before, after)]
        norms = {name: [float(jnp.linalg.norm(each[name])) for each in sizes] for name in cohort.specs}
        return [
            SiteChange(site=name, before=one, after=two, change=NAN, cosine=NAN) for name, (one, two) in norms.items()
        ]
    found = []
    for spec in cohort.sites:
        name = spec.info.name
        scale_L = np.asarray(spec.scales if spec.info.layers else spec.scales[0], np.float64)
        one, other = (cohort.factors(name, adapter, shared) for adapter in (before, after))
        products = [_inner(scale_L, *pair) for pair in ((one, one), (other, other), (one, other))]
        norm, norm_after = (float(np.sqrt(max(product, 0.0))) for product in products[:2])
        change = float(np.sqrt(max(products[0] + products[1] - 2 * products[2], 0.0)))
        cosine = products[2] / (norm * norm_after) if norm * norm_after else NAN
        found.append(SiteChange(site=name, before=norm, after=norm_after, change=change, cosine=cosine))
    return found


def _inner(scale_L: np.ndarray, one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> float:
    with jax.default_matmul_precision("highest"):
        grams = [jnp.matmul(x, y.mT) for x, y in zip(one, other, strict=True)]
    product = np.asarray(grams[0], np.float64) * np.asarray(grams[1], np.float64)
    # [L, R, R], or [L, E, R, R] at experts: the scale belongs to the layer.
    return float(np.sum(product * scale_L.reshape(scale_L.shape + (1,) * (product.ndim - scale_L.ndim)) ** 2))


def _flat(manifest: Manifest) -> dict[str, Any]:
    kept = {name: value for name, value in manifest.to_dict().items() if name not in _LEFT_OUT}
    return dict(_entries("", kept))


def _entries(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, entry in value.items():
        yield from _entries(f"{name}.{key}" if name else str(key), entry)
