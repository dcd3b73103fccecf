import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from popax.errors import CatalogError, PopulationError
from popax.store.layout import ALIGNMENT, RowLayout, row_digest

DTYPES = [np.dtype(name) for name in ("float32", "float64", "float16", "int8", "int32", "uint16", "bool", ">f4", ">i8")]
DTYPES += [np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "int4")]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
KEYS = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=8)


@st.composite
def arrays(draw):
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(SHAPES)
    bits = draw(hnp.arrays(np.uint8, (*shape, dtype.itemsize)))
    if dtype.name in ("bool", "int4"):  # not every byte is a value of theirs
        return (bits[..., 0] & 1).astype(dtype)
    return np.ascontiguousarray(bits).reshape(-1).view(dtype).reshape(shape)


TREES = st.dictionaries(KEYS, st.dictionaries(KEYS, arrays(), min_size=1, max_size=3), min_size=1, max_size=3)


@given(TREES)
def test_pack_and_unpack_are_inverse_bit_for_bit(tree):
    layout = RowLayout.of(tree)
    row = layout.pack(tree)
    found = layout.unpack(row)
    assert row.shape == (layout.row_bytes,)
    assert layout.row_bytes % ALIGNMENT == 0
    for site, leaves in tree.items():
        for name, leaf in leaves.items():
            assert found[site][name].dtype.name == leaf.dtype.name
            assert found[site][name].shape == leaf.shape
            little = leaf.astype(leaf.dtype.newbyteorder("<"))
            assert found[site][name].tobytes() == little.tobytes()
    assert row_digest(layout.pack(found)) == row_digest(row)


@given(TREES)
def test_layouts_survive_json_hash_and_ignore_key_order(tree):
    layout = RowLayout.of(tree)
    again = RowLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
    backwards = {site: dict(reversed(leaves.items())) for site, leaves in reversed(tree.items())}
    assert again == layout == RowLayout.of(backwards)
    assert hash(again) == hash(layout)
    assert again.digest == layout.digest
    for leaf in layout.leaves:
        assert leaf.offset % ALIGNMENT == 0
    for leaf, after in zip(layout.leaves, layout.leaves[1:], strict=False):
        assert leaf.offset + leaf.nbytes <= after.offset


def test_jax_arrays_and_abstract_ones_have_the_same_layout():
    tree = {"site": {"a": jnp.ones((2, 3), jnp.bfloat16), "n": jnp.int32(4)}}
    layout = RowLayout.of(jax.eval_shape(lambda: tree))
    found = layout.unpack(layout.pack(tree))
    assert found["site"]["a"].dtype == jnp.bfloat16
    assert found["site"]["n"] == 4


def test_what_does_not_fit_is_named():
    layout = RowLayout.of({"site": {"a": np.zeros((2, 3), np.float32)}})
    with pytest.raises(PopulationError, match=r"'site/a' is float32 \[2, 4\].* float32 \[2, 3\]"):
        layout.pack({"site": {"a": np.zeros((2, 4), np.float32)}})
    with pytest.raises(PopulationError, match="'site/a' is float16"):
        layout.pack({"site": {"a": np.zeros((2, 3), np.float16)}})
    with pytest.raises(PopulationError, match="site/b"):
        layout.pack({"site": {"b": np.zeros((2, 3), np.float32)}})
    with pytest.raises(CatalogError, match="64"):
        layout.unpack(np.zeros(63, np.uint8))
