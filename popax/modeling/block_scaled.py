"""Weights stored in 8 bits with a factor for each block (DeepSeek-V3's checkpoints), multiplied out while reading."""

import dataclasses

import numpy as np

from popax.errors import CheckpointError
from popax.modeling.tensor_files import StoredTensor

BLOCK = 128
DTYPE = "F8_E4M3"
SUFFIX = "_scale_inv"  # beside `x.weight`, `x.weight_scale_inv`


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockScaled:
    """values[r, c] * scales[r // 128, c // 128], as one tensor of values' name and shape."""

    values: StoredTensor
    scales: StoredTensor

    def __post_init__(self):
        wanted = tuple(-(-size // BLOCK) for size in self.values.shape)
        if len(wanted) != 2 or self.scales.shape != wanted:
            raise CheckpointError(
                f"{self.scales.name} is {self.scales.shape}: blocks of {BLOCK} x {BLOCK} of {self.values.name} "
                f"{self.values.shape} need {wanted}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return self.values, self.scales

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """float32, this slice of the product."""
        blocks = (np.arange(*part.indices(size)) // BLOCK for part, size in zip(index, self.shape, strict=True))
        rows, columns = blocks
        factors = self.scales.read((slice(None), slice(None))).astype(np.float32)
        return self.values.read(index).astype(np.float32) * factors[rows[:, None], columns[None, :]]
