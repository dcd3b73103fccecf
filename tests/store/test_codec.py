"""Rows in fewer bits: what comes back is within half a step, and the layout is the row's own."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from popax.errors import CatalogError, PopulationError
from popax.store.codec import CODECS, codec_of
from popax.store.layout import RowLayout

SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, max_side=7)


@settings(max_examples=60)
@given(
    codec=st.sampled_from(list(CODECS.values())),
    x=SHAPES.flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=st.floats(-1e6, 1e6, width=32))),
)
def test_every_entry_is_within_half_a_step_of_its_rows_scale(codec, x):
    layout = RowLayout.of({"s": {"x": x, "n": np.arange(3, dtype=np.int32)}})
    row = layout.pack({"s": {"x": x, "n": np.arange(3, dtype=np.int32)}})
    stored = codec.encode(layout, row)
    assert stored.shape == (codec.stored_bytes(layout),)
    back = layout.unpack(codec.decode(layout, stored))["s"]
    np.testing.assert_array_equal(back["n"], np.arange(3))
    top = np.abs(x).max(axis=-1, keepdims=True) if x.ndim else np.abs(x)
    scale = (top / codec.levels).astype(np.float32).astype(np.float64)
    # Half a step, and the rounding of the scale and of the result to float32.
    allowed = scale / 2 * (1 + 1e-5) + np.abs(x) * 1e-6 + codec.levels * np.finfo(np.float32).tiny
    assert (np.abs(back["x"].astype(np.float64) - x) <= allowed).all()


@pytest.mark.parametrize("codec", CODECS.values())
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_integers_times_a_power_of_two_come_back_exactly(codec, dtype):
    """A closed form: x = k / 8 with max |k| = levels has the scale 1/8, and no rounding."""
    k = np.random.default_rng(0).integers(-codec.levels, codec.levels + 1, (4, 6, 16))
    k[..., 0] = codec.levels
    x = {"s": {"x": (k / 8).astype(dtype)}}
    layout = RowLayout.of(x)
    back = codec.decode(layout, codec.encode(layout, layout.pack(x)))
    np.testing.assert_array_equal(back, layout.pack(x))
    assert codec.error(layout, layout.pack(x), back) == 0


def test_sizes_are_those_of_the_bits():
    layout = RowLayout.of({"s": {"x": np.zeros((8, 64), np.float32)}})
    assert codec_of("int8").stored_bytes(layout) == 8 * 4 + 8 * 64
    assert codec_of("int4").stored_bytes(layout) == 8 * 4 + 8 * 64 // 2


def test_the_error_is_the_relative_norm():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 3, 5)).astype(np.float32)
    layout = RowLayout.of({"s": {"x": x}})
    found = codec_of("int8").error(layout, layout.pack({"s": {"x": x}}), layout.pack({"s": {"x": y}}))
    np.testing.assert_allclose(found, np.linalg.norm(x - y) / np.linalg.norm(x), rtol=1e-6)
    zero = layout.pack({"s": {"x": np.zeros_like(x)}})
    assert codec_of("int8").error(layout, zero, zero) == 0
    assert codec_of("int8").error(layout, zero, layout.pack({"s": {"x": x}})) == np.inf


def test_what_cannot_be_encoded_or_decoded_is_named():
    layout = RowLayout.of({"s": {"x": np.zeros(4, np.float32)}})
    for wrong in (np.nan, np.inf):
        row = layout.pack({"s": {"x": np.array([0, wrong, 0, 0], np.float32)}})
        with pytest.raises(PopulationError, match="'s/x' holds what is not a finite number"):
            codec_of("int8").encode(layout, row)
    with pytest.raises(CatalogError, match="of 3 bytes, its layout makes 8"):
        codec_of("int8").decode(layout, np.zeros(3, np.uint8))
    with pytest.raises(CatalogError, match="'int2': one of int8, int4"):
        codec_of("int2")
