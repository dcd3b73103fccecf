"""Bases that are quantised while they are read: from Hugging Face's files and popax's, whole and sharded."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from popax.errors import CheckpointError, ConfigError
from popax.modeling import hf, rounded
from popax.modeling.base import load_base, save_base
from popax.modeling.quantise_rules import QuantiseRule
from popax.modeling.quantised import round_weight
from popax.trees import flatten_named
from tests.modeling.test_base import FILE, hf_record, hf_tensors


@pytest.fixture
def directory(tiny, tmp_path):
    place = tmp_path / "hf"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(hf_record(tiny.config)))
    save_file(hf_tensors(tiny.params), place / FILE)
    return place


def same(found, wanted):
    found, wanted = flatten_named(found), flatten_named(wanted)
    assert list(found) == list(wanted)
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(*(np.asarray(each).astype(np.float32) for each in (found[name], leaf)), name)
        assert found[name].dtype == leaf.dtype


@pytest.mark.parametrize("quantise", ["int8", "int4:8"])
def test_weights_are_rounded_while_they_are_read(directory, tiny, quantise, mesh, tmp_path):
    base = load_base(directory, quantise=quantise)
    flat, stored = flatten_named(base.params), flatten_named(tiny.params)
    for name, leaf in stored.items():
        if name in flat:
            np.testing.assert_array_equal(flat[name], leaf)
            continue
        wanted = round_weight(np.asarray(leaf), base.model.quantise_rule(name), np)
        same({"v": flat[name + "/values"], "s": flat[name + "/scales"]}, {"v": wanted.values, "s": wanted.scales})
    assert {name.rpartition("/")[0] for name in flat if name.endswith("/values")} == {
        name for name in stored if name.startswith("layers/") and name.endswith("/kernel")
    }
    sharded = load_base(directory, quantise=quantise, mesh=mesh)
    same(sharded.params, base.params)
    same(hf.open_weights(directory, base.model).load(mesh=mesh, exchange=True)[0], base.params)
    assert flatten_named(sharded.params)["layers/attn/q_proj/kernel/values"].sharding.num_devices == 8
    # popax's own format: quantised when read, and as it was written.
    plain = load_base(directory)
    save_base(tmp_path / "plain", plain)
    save_base(tmp_path / "rounded", base)
    for place, options in (("plain", {"quantise": quantise}), ("rounded", {}), ("rounded", {"quantise": quantise})):
        again = load_base(tmp_path / place, **options)
        assert (again.model, again.digest) == (base.model, base.digest)
        same(again.params, base.params)
    same(load_base(tmp_path / "plain", quantise=quantise, mesh=mesh).params, base.params)
    assert load_base(tmp_path / "plain", quantise=quantise, keep_digest=True).digest == plain.digest
    with pytest.raises(ConfigError, match="quantised already"):
        load_base(tmp_path / "rounded", quantise="int8:16")


def test_a_quantised_base_has_a_name_of_its_own(directory):
    digests = {quantise: load_base(directory, quantise=quantise).digest for quantise in (None, "int8", "int8:8", "fp8")}
    assert len(set(digests.values())) == len(digests)
    assert load_base(directory, quantise="int8", keep_digest=True).digest == digests[None]


def test_a_strip_is_in_memory_as_it_was_stored(monkeypatch):
    monkeypatch.setattr(rounded, "STRIP_ROWS", 2)
    weight = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)  # [d_out, d_in]
    asked = []

    class Stored:
        shape, stored = weight.shape, ()

        def read(self, index):
            asked.append(index)
            return weight[index]

    rule = QuantiseRule(dtype="int8", group=3)
    wanted = round_weight(weight.T, rule, np)
    values, scales = (made(tensor=Stored(), rule=rule) for made in (rounded.RoundedValues, rounded.RoundedScales))
    np.testing.assert_array_equal(values.read((slice(1, 4), slice(2, 5))), wanted.values[2:5, 1:4].T)
    # All input features of the wanted channels: a factor is of all of them.
    assert [weight[index].shape for index in asked] == [(3, 6)]
    assert scales.shape == (8, 2)
    asked.clear()
    np.testing.assert_array_equal(scales.read((slice(1, 6), slice(1, 2))), wanted.scales[1:, 1:6].T)
    assert [weight[index].shape for index in asked] == [(2, 6), (2, 6), (1, 6)]


def test_what_is_not_finite_is_refused_by_name(directory):
    tensors = load_file(directory / FILE)
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = np.where(np.arange(tensors[name].shape[1]) == 3, np.nan, tensors[name]).astype(np.float32)
    save_file(tensors, directory / FILE)
    with pytest.raises(CheckpointError, match=name):
        load_base(directory, quantise="int8")
