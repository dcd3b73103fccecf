"""Rows as coefficients in a basis that a cluster of users shares (joint diagonalisation, arXiv 2407.00066)."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from popax.adapters.base import SiteSpec
from popax.adapters.table import method_of
from popax.errors import CatalogError, PopulationError
from popax.store.codec import IntegerCodec, basis_label, codec_of
from popax.store.cohort import StoredCohort
from popax.store.layout import RowLayout, row_digest
from popax.store.records import text_digest

Factors = tuple[np.ndarray, np.ndarray]  # a [..., R, D], b [..., R, F]: the weight update is s a^T b


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal rows at each site: {site: {"a": [L, S, D], "b": [L, S, F]}} float32, no L outside the stack; S is
    no more than D, or F.

    An update a^T b is kept as its projection onto them, p p^T (a^T b) q q^T with p = "a", q = "b".
    """

    arrays: Mapping[str, Mapping[str, np.ndarray]]

    @functools.cached_property
    def layout(self) -> RowLayout:
        return RowLayout.of(self.arrays)

    @functools.cached_property
    def packed(self) -> np.ndarray:
        return self.layout.pack(self.arrays)

    @functools.cached_property
    def digest(self) -> str:
        return text_digest(self.layout.digest, row_digest(self.packed))


def paired_sites(cohort: StoredCohort) -> list[str]:
    """The sites of the cohort whose update is one product a^T b a layer. Raises CatalogError where there are none: a
    method that shares a basis already, or experts with a factor of their own each."""
    method = method_of(cohort.config)
    if set(method.state_axes) != {"a", "b"} or method.shared_axes:
        raise CatalogError(
            f"method={cohort.config.method!r} has no pair of factors to share a basis; compress its rows with "
            "int8 or int4"
        )
    shapes = {leaf.name: leaf.shape for leaf in cohort.layout.leaves}
    dims = {name: 3 if spec.info.layers else 2 for name, spec in cohort.specs.items()}
    found = [name for name in dims if len(shapes[f"{name}/a"]) == len(shapes[f"{name}/b"]) == dims[name]]
    if not found:
        raise CatalogError("every site of this cohort is one of routed experts: compress its rows with int8 or int4")
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class BasisCodec:
    """Rows of a cohort as coefficients in `basis`, float32 or in `inner`'s integers; what has no pair of factors is
    kept as it is.

    Where the basis is no wider than the narrowest layer (S <= r) a site keeps the core p a^T b q^T [L, S, S], else both
    projections, a p^T and b q^T [L, R, S]: whichever gives back factors of the cohort's own rank. place: where the
    catalog keeps the basis (`BasisShelf.put`).
    """

    cohort: StoredCohort
    basis: Basis
    inner: IntegerCodec | None = None
    place: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        inner = self.inner.name if self.inner else None
        return {"name": "basis", "basis": self.basis.digest, "inner": inner, **self.place}

    @property
    def label(self) -> str:
        return basis_label(self.basis.digest, self.inner.name if self.inner else None)

    def stored_bytes(self, layout: RowLayout) -> int:
        coefficients = self._coefficient_layout
        return self.inner.stored_bytes(coefficients) if self.inner else coefficients.row_bytes

    def encode(self, layout: RowLayout, row: np.ndarray) -> np.ndarray:
        """uint8 [stored_bytes]. Raises PopulationError where a factor is not finite."""
        row_tree = layout.unpack(row)
        coefficients = {
            name: self._project(name, leaves) if name in self.basis.arrays else dict(leaves)
            for name, leaves in row_tree.items()
        }
        packed = self._coefficient_layout.pack(coefficients)
        return self.inner.encode(self._coefficient_layout, packed) if self.inner else packed

    def decode(self, layout: RowLayout, stored: np.ndarray) -> np.ndarray:
        """The packed row, uint8 [row_bytes]. Raises CatalogError on another length."""
        if self.inner:
            stored = self.inner.decode(self._coefficient_layout, stored)
        coefficients = self._coefficient_layout.unpack(stored)
        own = layout.unpack(np.zeros(layout.row_bytes, np.uint8))
        tree = {
            name: self._lift(name, leaves, own[name]) if name in self.basis.arrays else leaves
            for name, leaves in coefficients.items()
        }
        return layout.pack(tree)

    def error(self, layout: RowLayout, row: np.ndarray, decoded: np.ndarray) -> float:
        """||W' - W||_F / ||W||_F of the weight updates at the basis's sites; 0 where both are zero."""
        return update_error(self.cohort, row, decoded, list(self.basis.arrays))

    @functools.cached_property
    def _coefficient_layout(self) -> RowLayout:
        own = self.cohort.layout.unpack(np.zeros(self.cohort.layout.row_bytes, np.uint8))
        return RowLayout.of(
            {name: self._project(name, leaves) if name in self.basis.arrays else leaves for name, leaves in own.items()}
        )

    def _is_core(self, name: str) -> bool:
        return self.basis.arrays[name]["a"].shape[-2] <= min(self.cohort.specs[name].ranks)

    def _project(self, name: str, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        a, b = factors(leaves)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise PopulationError(f"site {name!r} holds what is not a finite number: it has no projection")
        at = self.basis.arrays[name]
        inner_a, inner_b = a @ _t(at["a"]), b @ _t(at["b"])
        if self._is_core(name):
            return {"core": _t(inner_a) @ inner_b}
        return {"a": inner_a, "b": inner_b}

    def _lift(
        self, name: str, coefficients: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        at = self.basis.arrays[name]
        if "core" in coefficients:
            a, b = at["a"], coefficients["core"] @ at["b"]
            missing = own["a"].shape[-2] - a.shape[-2]
            padding = [(0, 0)] * (a.ndim - 2) + [(0, missing), (0, 0)]
            a, b = np.pad(a, padding), np.pad(b, padding)
        else:
            a, b = coefficients["a"] @ at["a"], coefficients["b"] @ at["b"]
        return {"a": a.astype(own["a"].dtype), "b": b.astype(own["b"].dtype)}


def codec_from(cohort: StoredCohort, basis: Basis, record: Mapping[str, Any]) -> BasisCodec:
    """The codec that a manifest keeps this record of."""
    return BasisCodec(cohort, basis, codec_of(record["inner"]) if record.get("inner") else None)


def update_error(cohort: StoredCohort, row: np.ndarray, other: np.ndarray, sites: Sequence[str]) -> float:
    """||W' - W||_F / ||W||_F of two rows' weight updates at these sites; 0 where both are zero."""
    one, two = cohort.layout.unpack(row), cohort.layout.unpack(other)
    norm = both = there = 0.0
    for name in sites:
        spec, mine, theirs = cohort.specs[name], factors(one[name], np.float64), factors(two[name], np.float64)
        norm += _product(spec, mine, mine)
        both += _product(spec, mine, theirs)
        there += _product(spec, theirs, theirs)
    difference = max(norm + there - 2 * both, 0.0)
    return math.sqrt(difference / norm) if norm else (0.0 if not difference else math.inf)


def factors(leaves: Mapping[str, np.ndarray], dtype: type = np.float32) -> Factors:
    """a and b, as numbers to compute with."""
    return np.asarray(leaves["a"], dtype), np.asarray(leaves["b"], dtype)


def _product(spec: SiteSpec, one: Factors, two: Factors) -> float:
    """<s a^T b, s a'^T b'> over the site's layers = s^2 tr(a' a^T b b'^T)."""
    (a, b), (other_a, other_b) = one, two
    inner_L = np.sum((other_a @ _t(a)) * (other_b @ _t(b)), axis=(-2, -1))
    scale_L = np.asarray(spec.scales if spec.info.layers else spec.scales[0], np.float64)
    return float(np.sum(scale_L**2 * inner_L))


def _t(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)
