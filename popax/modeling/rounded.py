"""A stored weight read in fewer bits: one matrix at a time is in memory as it was stored."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from popax.errors import CheckpointError
from popax.modeling.quantise_rules import QuantiseRule
from popax.modeling.quantised import round_weight, weight_scales

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundedReader:
    """A weight of this shape [..., d_in, d_out] and name. read(index): a part of it, float32."""

    name: str
    shape: tuple[int, ...]
    rule: QuantiseRule
    read: Callable[[Index], np.ndarray]

    def values(self, index: Index) -> np.ndarray:
        """values[index] of the quantised weight. Raises CheckpointError where the weight is not finite."""
        rounded = (round_weight(matrix, self.rule, np).values[index[-2]] for matrix in self._matrices(index))
        return self._stacked(rounded, index)

    def scales(self, index: Index) -> np.ndarray:
        """scales[index] of it."""
        return self._stacked((weight_scales(m, self.rule, np)[index[-2]] for m in self._matrices(index)), index)

    def _matrices(self, index: Index) -> Iterator[np.ndarray]:
        """[d_in, columns] of each layer and expert of the index: a factor is of all input features, so all are read."""
        for at in itertools.product(*self._lead(index)):
            one = tuple(slice(number, number + 1) for number in at)
            matrix = self.read((*one, slice(None), index[-1]))
            if not np.isfinite(matrix).all():
                raise CheckpointError(
                    f"{self.name}{list(at)} holds numbers that are not finite, and cannot be quantised: download it "
                    "again, or keep it as stored by a rule"
                )
            yield matrix.reshape(matrix.shape[len(at) :])

    def _stacked(self, matrices: Iterator[np.ndarray], index: Index) -> np.ndarray:
        lead = [len(numbers) for numbers in self._lead(index)]
        first = next(matrices)
        stacked = np.empty((math.prod(lead), *first.shape), first.dtype)
        for at, matrix in enumerate(itertools.chain((first,), matrices)):
            stacked[at] = matrix
        return stacked.reshape(*lead, *first.shape)

    def _lead(self, index: Index) -> list[range]:
        return [range(*part.indices(size)) for part, size in zip(index[:-2], self.shape[:-2], strict=True)]
