"""Weights in fewer bits, made from stored tensors strip by strip while they are read."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from popax.errors import CheckpointError
from popax.modeling.model import Model
from popax.modeling.quantise_rules import QuantiseRule
from popax.modeling.quantised import SCALES, VALUES, Quantised, round_weight
from popax.modeling.shards import Slices, Source
from popax.modeling.tensor_files import StoredTensor
from popax.trees import flatten_named

# Rows of a tensor that are in memory in full at a time, where few numbers are made of many.
STRIP_ROWS = 256


def rounded_sources(model: Model, sources: Mapping[str, Source]) -> dict[str, Source]:
    """The sources of the model's parameters from those of the unquantised model's."""
    kept, abstract = {}, flatten_named(model.abstract())
    for name, source in sources.items():
        if name in abstract:
            kept[name] = source
            continue
        rule = model.quantise_rule(name)
        for part, made in ((VALUES, RoundedValues), (SCALES, RoundedScales)):
            kept[name + part] = source._replace(tensors=[made(tensor=t, rule=rule) for t in source.tensors])
    return kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundedValues:
    """The values of a tensor stored as [d_out, d_in]. A factor is of all input features, so all of a row are read."""

    tensor: Slices
    rule: QuantiseRule

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return self.tensor.stored

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        return _rounded(self.tensor, self.rule, index[0]).values.T[:, index[1]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundedScales:
    """The factors beside these values, [d_out, groups]. What is stored counts as the values' own."""

    tensor: Slices
    rule: QuantiseRule

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[0], self.rule.groups(self.tensor.shape[1])

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return ()

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(self.shape[0])
        strips = (slice(at, min(at + STRIP_ROWS, stop)) for at in range(start, stop, STRIP_ROWS))
        return np.concatenate([_rounded(self.tensor, self.rule, strip).scales.T[:, index[1]] for strip in strips])


def _rounded(tensor: Slices, rule: QuantiseRule, rows: slice) -> Quantised:
    """Of these output channels, [d_in, rows]. Raises CheckpointError where the tensor is not finite there."""
    matrix = np.asarray(tensor.read((rows, slice(None))), np.float32).T
    if not np.isfinite(matrix).all():
        raise CheckpointError(
            f"{tensor.stored[0].name} in {tensor.stored[0].file} holds numbers that are not finite, and cannot be "
            "quantised: download it again, or keep it as stored by a rule"
        )
    return round_weight(matrix, rule, np)
