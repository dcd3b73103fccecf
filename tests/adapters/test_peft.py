"""PEFT directories: the round trip, what the files hold, and every refusal by name. No peft needed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from popax.adapters.base import ALL_LINEAR, ALPHA_RULES, AdapterConfig, TargetRule, resolve
from popax.adapters.cohort import Cohort
from popax.adapters.peft import load_peft, save_peft
from popax.adapters.table import ROWS
from popax.errors import PeftError, PopaxError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q1 = "base_model.model.model.layers.1.self_attn.q_proj"


def _random(cohort, seed=0):
    """Non-zero up to each layer's rank, zero beyond, whatever the method's leaves are."""
    rng = np.random.default_rng(seed)

    def array_of(axes, like, ranks):
        array = rng.standard_normal(like.shape).astype(np.float32)
        lead = int(axes[0] == "layers")
        for axis in (index for index, logical in enumerate(axes) if logical == "rank"):
            for layer, rank in enumerate(ranks):
                np.moveaxis(array[layer] if lead else array, axis - lead, 0)[rank:] = 0  # a view
        return jnp.asarray(array).astype(like.dtype)

    return {
        name: {leaf: array_of(cohort.axes()[name][leaf], like, cohort.specs[name].ranks) for leaf, like in own.items()}
        for name, own in cohort.abstract().items()
    }


def _load_native(toy, directory):
    return load_peft(directory, toy.sites, base_weight=toy.weights.__getitem__, base_bias=toy.biases.__getitem__)


def _layout(specs):
    return {name: (spec.ranks, spec.scales) for name, spec in specs.items()}


def _save(path, cohort, adapter, **options):
    return save_peft(path, adapter, config=cohort.config, specs=cohort.specs, **options)


@pytest.fixture
def saved(toy, tmp_path):
    """A saved adapter with everything uniform: (directory, cohort, adapter)."""
    cohort = toy.cohort(targets=(TargetRule(pattern=ALL_LINEAR),))
    adapter = _random(cohort)
    return _save(tmp_path / "adapter", cohort, adapter, base_name="base"), cohort, adapter


def _edit(directory, **changes):
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_tensors(directory, edit):
    tensors = safetensors.numpy.load_file(directory / WEIGHTS)
    edit(tensors)
    safetensors.numpy.save_file(tensors, directory / WEIGHTS)


@pytest.mark.parametrize("rule", ALPHA_RULES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_bitwise(toy, tmp_path, rule, dtype):
    """popax -> PEFT -> popax: the same bits, ranks and scales, with rank and alpha mixed over layers and sites."""
    cohort = toy.cohort(alpha_rule=rule, dtype=dtype, dropout=0.1, init="gaussian")
    adapter = _random(cohort)
    config, back = load_peft(_save(tmp_path / "a", cohort, adapter), toy.sites)
    specs = resolve(config, toy.sites)
    assert {name: spec.ranks for name, spec in specs.items()} == {n: s.ranks for n, s in cohort.specs.items()}
    for name, spec in specs.items():
        np.testing.assert_array_equal(np.float32(spec.scales), np.float32(cohort.specs[name].scales))
        if rule != "constant":
            assert spec.scales == cohort.specs[name].scales
    assert (config.dtype, config.dropout, config.init, config.method) == (dtype, 0.1, "gaussian", "lora")
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), back) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), Cohort.of(config, toy.sites).abstract()
    )
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(np.asarray(one), np.asarray(other)), back, adapter)
    # and again, now from what was read: nothing drifts
    again_config, again = load_peft(save_peft(tmp_path / "b", back, config=config, specs=specs), toy.sites)
    assert again_config == config
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(np.asarray(one), np.asarray(other)), again, adapter)


@pytest.mark.parametrize("row", ROWS)
def test_any_method_is_written_as_its_exact_factors(toy, tmp_path, row):
    """x W + s x A^T B read back as LoRA == the method's own output; a method without factors says so."""
    cohort = toy.cohort(row=row)
    adapter = toy.trained(cohort)
    if not cohort.adds and cohort.method.peft is None:
        with pytest.raises(PeftError, match=cohort.config.method):
            _save(tmp_path / "a", cohort, adapter, shared=toy.shared(cohort))
        return
    directory = _save(tmp_path / "a", cohort, adapter, shared=toy.shared(cohort))
    if cohort.method.peft is not None:  # tests/adapters/test_peft_native_parity.py has peft read it
        record = json.loads((directory / CONFIG).read_text())
        assert record == record | {
            key: value for key, value in cohort.method.peft.record(cohort.config).items() if value is not None
        }
        config, back = _load_native(toy, directory)
        again = Cohort.of(config, toy.sites)
        assert (again.config.method, again.specs) == (cohort.config.method, cohort.specs)
        ours, theirs = toy.run(cohort, adapter, toy.x()), toy.run(again, back, toy.x())
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)
        return
    config, as_lora = load_peft(directory, toy.sites)
    ours, theirs = toy.run(cohort, adapter, toy.x()), toy.run(Cohort.of(config, toy.sites), as_lora, toy.x())
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)
    assert float(jnp.max(jnp.abs(ours - toy.base(toy.x())))) > 1e-3
    if cohort.method.shared_axes:
        with pytest.raises(PeftError, match=f"{cohort.config.method}.*shared="):
            _save(tmp_path / "b", cohort, adapter)
        assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("ia3", {"feedforward_modules": ["down_proj"]}, "keeps one of a site"),
        ("ia3", {"feedforward_modules": ["q_proj"]}, "gain on what enters it"),
        ("ia3", {"target_modules": ["q_proj"]}, "no module of its config"),
        ("ia3", {"fan_in_fan_out": True}, "fan_in_fan_out"),
        ("dora", {"r": 3, "rank_pattern": {}}, "this model and the config need"),
        ("prompt", {"num_virtual_tokens": 5}, "this model and the config need"),
        ("prompt", {"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
        ("prompt", {"num_virtual_tokens": None}, "num_virtual_tokens=None"),
    ],
)
def test_kinds_of_their_own_are_refused_by_name(toy, tmp_path, method, changes, words):
    cohort = toy.cohort(method)
    directory = _save(tmp_path / "a", cohort, toy.trained(cohort), shared=toy.shared(cohort))
    _edit(directory, **changes)
    with pytest.raises(PeftError, match=words):
        _load_native(toy, directory)


def test_lora_xs_factors_are_not_rounded_to_a_narrow_core(toy, tmp_path):
    cohort = toy.cohort("lora_xs", dtype="bfloat16")
    directory = _save(tmp_path / "a", cohort, _random(cohort), shared=toy.shared(cohort))
    assert load_peft(directory, toy.sites)[0].dtype == "float32"
    assert load_peft(directory, toy.sites, dtype="bfloat16")[0].dtype == "bfloat16"


def test_uniform_configs_are_concise(toy, saved):
    directory, cohort, _ = saved
    record = json.loads((directory / CONFIG).read_text())
    assert record["target_modules"] == ["down_proj", "o_proj", "q_proj", "up_proj"]
    assert (record["r"], record["lora_alpha"], record["use_rslora"]) == (4, 8, False)
    assert (record["rank_pattern"], record["alpha_pattern"]) == ({}, {})
    assert record["base_model_name_or_path"] == "base"
    assert load_peft(directory, toy.sites)[0].targets == (TargetRule(pattern=ALL_LINEAR),)
    assert _layout(resolve(load_peft(directory, toy.sites)[0], toy.sites)) == _layout(cohort.specs)


def test_what_the_file_holds(toy, saved):
    directory, _, adapter = saved
    tensors = safetensors.numpy.load_file(directory / WEIGHTS)
    assert len(tensors) == 2 * 4 * 3
    np.testing.assert_array_equal(tensors[f"{Q1}.lora_A.weight"], adapter["layers.attn.q_proj"]["a"][1])
    np.testing.assert_array_equal(tensors[f"{Q1}.lora_B.weight"], adapter["layers.attn.q_proj"]["b"][1].T)


def test_mixed_configs_name_modules_whole(toy, tmp_path):
    """No two patterns fit one module: peft sorts the keys of its JSON, and the first that matches wins."""
    cohort = toy.cohort()
    directory = _save(tmp_path / "a", cohort, _random(cohort))
    record = json.loads((directory / CONFIG).read_text())
    assert record["rank_pattern"] == {
        "lm_head": 3,
        "model.layers.1.self_attn.q_proj": 2,
        "model.layers.1.self_attn.o_proj": 2,
    }
    assert record["alpha_pattern"] == {"model.layers.1.self_attn.q_proj": 3, "model.layers.1.self_attn.o_proj": 3}
    assert set(record["target_modules"]) == {
        *("q_proj", "o_proj", "down_proj", "lm_head"),
        *("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"),
    }
    tensors = safetensors.numpy.load_file(directory / WEIGHTS)
    assert tensors[f"{Q1}.lora_A.weight"].shape == (2, 12)
    assert not any("layers.2.mlp.up_proj" in name for name in tensors)


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 7, 8])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 1.9, -0.3, 0.0])
def test_a_constant_alpha_survives_the_division_by_the_rank(toy, tmp_path, rank, alpha):
    cohort = toy.cohort(alpha_rule="constant", rank=rank, alpha=alpha, targets=("lm_head",))
    config, _ = load_peft(_save(tmp_path / "a", cohort, _random(cohort)), toy.sites)
    scale = resolve(config, toy.sites)["lm_head"].scales[0]
    assert np.float32(scale) == np.float32(alpha)
    assert scale == pytest.approx(alpha, rel=3e-16)


@pytest.mark.parametrize(
    ("changes", "adapted"),
    [
        ({"target_modules": "all-linear"}, "all"),
        ({"target_modules": r".*\.(q|o|up|down)_proj"}, "all"),
        ({"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.\w+"}, "all"),
        (
            {
                "target_modules": [
                    f"{block}.{name}_proj"
                    for block, names in (("self_attn", "q o"), ("mlp", "up down"))
                    for name in names.split()
                ]
            },
            "all",
        ),
        (
            {"target_modules": ["lm_head", "q_proj", "o_proj", "up_proj", "down_proj"], "exclude_modules": ["lm_head"]},
            "all",
        ),
        ({"target_modules": "model.*", "exclude_modules": "lm_.*"}, "all"),
        ({"layers_to_transform": [0, 1, 2]}, "all"),
        ({"layers_to_transform": [0, 1, 2], "layers_pattern": "layers"}, "all"),
        ({"layers_to_transform": [0, 1, 2], "layers_pattern": ["h", "layers"]}, "all"),
        ({"layers_to_transform": 1}, {1}),
        ({"layers_to_transform": [0, 2]}, {0, 2}),
        ({"exclude_modules": r".*\.0\..*"}, {1, 2}),
    ],
)
def test_target_modules(toy, saved, changes, adapted):
    """Each way peft has of naming modules; tensors of layers that are not named are taken out first."""
    directory, cohort, adapter = saved
    _edit(directory, **changes)
    if adapted != "all":
        gone = [f"layers.{layer}." for layer in {0, 1, 2} - adapted]
        _edit_tensors(directory, lambda tensors: [tensors.pop(k) for k in list(tensors) if any(g in k for g in gone)])
    config, back = load_peft(directory, toy.sites)
    layers = {0, 1, 2} if adapted == "all" else adapted
    ranks = tuple(4 if layer in layers else 0 for layer in range(3))
    assert {name: spec.ranks for name, spec in resolve(config, toy.sites).items()} == dict.fromkeys(cohort.specs, ranks)
    assert len(config.targets) == 1
    for name, leaves in adapter.items():
        for leaf, array in leaves.items():
            keep = np.isin(np.arange(3), list(layers))[:, None, None]
            np.testing.assert_array_equal(back[name][leaf], np.where(keep, array, 0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, ["LOHA"]),
        ({"use_dora": True}, ["dora", "base_weight"]),
        ({"bias": "all"}, ["bias", "all"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save"]),
        ({"fan_in_fan_out": True}, ["fan_in_fan_out"]),
        ({"lora_bias": True}, ["lora_bias"]),
        ({"layer_replication": [[0, 2], [1, 3]]}, ["layer_replication"]),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, ["target_parameters"]),
        ({"trainable_token_indices": [1]}, ["trainable_token_indices"]),
        ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens"]),
        ({"use_qalora": True}, ["use_qalora"]),
        ({"init_lora_weights": "pissa"}, ["pissa"]),
        ({"init_lora_weights": 1}, ["init_lora_weights"]),
        ({"an_option_of_next_year": 3}, ["an_option_of_next_year"]),
        ({"target_modules": None}, ["target_modules"]),
        ({"target_modules": []}, ["target_modules"]),
        ({"target_modules": ["c_attn"]}, ["c_attn", "lm_head"]),
        ({"target_modules": "model(("}, ["regular expression"]),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, ["layers_to_transform"]),
        ({"target_modules": ["q_proj", "o_proj", "up_proj"]}, ["down_proj", "no place"]),
        ({"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj", "lm_head"]}, ["lm_head", "lacks"]),
        ({"rank_pattern": {"q_proj": 3}}, ["(4, 12)", "(3, 12)"]),
        ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern", "0"]),
        ({"rank_pattern": ["q_proj"]}, ["rank_pattern"]),
        ({"rank_pattern": {"q_(": 3}}, ["regular expression"]),
        ({"r": "8"}, ["r='8'"]),
        ({"r": True}, ["r=True"]),
        ({"lora_alpha": "much"}, ["lora_alpha"]),
        ({"alpha_pattern": {"q_proj": None}}, ["alpha_pattern"]),
        ({"lora_dropout": 1.0}, ["dropout"]),
    ],
)
def test_refuses_by_name(toy, saved, changes, words):
    directory, *_ = saved
    _edit(directory, **changes)
    with pytest.raises(PeftError) as caught:
        load_peft(directory, toy.sites)
    assert all(word in str(caught.value) for word in words)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": False, "modules_to_save": None, "layer_replication": None, "an_option_of_next_year": None},
        {"peft_version": "9.9", "revision": "main", "inference_mode": False, "megatron_core": "megatron.core"},
        {"init_lora_weights": "orthogonal", "loftq_config": {}, "qalora_group_size": 16},
        {"rank_pattern": None, "alpha_pattern": {}},
    ],
)
def test_ignores_what_has_no_effect(toy, saved, changes):
    directory, cohort, _ = saved
    _edit(directory, **changes)
    assert _layout(resolve(load_peft(directory, toy.sites)[0], toy.sites)) == _layout(cohort.specs)


def test_defaults_are_pefts(toy, saved):
    directory, *_ = saved
    record = json.loads((directory / CONFIG).read_text())
    kept = {key: record[key] for key in ("peft_type", "r", "target_modules")}
    (directory / CONFIG).write_text(json.dumps(kept))
    assert resolve(load_peft(directory, toy.sites)[0], toy.sites)["layers.attn.q_proj"].scales == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(f"{Q1}.lora_B.weight"), ["lacks", f"{Q1}.lora_B.weight"]),
        (lambda t: t.update({f"{Q1}.lora_magnitude_vector": np.ones(8, np.float32)}), ["lora_magnitude_vector"]),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 9), np.float32)}),
            ["lora_embedding_A"],
        ),
        (lambda t: t.update({f"{Q1}.lora_A.weight": np.ones((12, 4), np.float32)}), ["(12, 4)", "(4, 12)"]),
        (lambda t: t.update({f"{Q1}.lora_A.weight": np.ones((4, 12), np.float16)}), ["float16", "float32", "dtype="]),
        (lambda t: t.update({f"{Q1}.lora_A.weight": np.ones((4, 12), np.int8)}), ["I8"]),
        (
            lambda t: t.update({"base_model.model.lm_head.base_layer.weight": np.ones((17, 12), np.float32)}),
            ["base_weight="],
        ),
    ],
)
def test_refuses_tensors_by_name(toy, saved, edit, words):
    directory, *_ = saved
    _edit_tensors(directory, edit)
    with pytest.raises(PeftError) as caught:
        load_peft(directory, toy.sites)
    assert all(word in str(caught.value) for word in words)


def test_refuses_files_that_are_not_there_or_not_whole(toy, saved, tmp_path):
    directory, *_ = saved
    with pytest.raises(PeftError, match="not a PEFT directory"):
        load_peft(tmp_path / "nowhere", toy.sites)
    whole = (directory / WEIGHTS).read_bytes()
    for part in (whole[:-3], whole[:20], b""):
        (directory / WEIGHTS).write_bytes(part)
        with pytest.raises(PeftError, match="truncated"):
            load_peft(directory, toy.sites)
    (directory / WEIGHTS).unlink()
    with pytest.raises(PeftError, match="does not exist"):
        load_peft(directory, toy.sites)
    (directory / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(PeftError, match="pickle"):
        load_peft(directory, toy.sites)
    (directory / CONFIG).write_text("{")
    with pytest.raises(PeftError, match="cannot be read"):
        load_peft(directory, toy.sites)


def test_a_copy_of_the_head_has_to_be_the_bases(toy, tmp_path):
    cohort = toy.cohort(targets=("lm_head",))
    directory, adapter = tmp_path / "a", _random(cohort)
    _save(directory, cohort, adapter)
    head = np.ascontiguousarray(np.asarray(toy.weights["lm_head"]).T)
    _edit_tensors(directory, lambda tensors: tensors.update({"base_model.model.lm_head.base_layer.weight": head}))
    with pytest.raises(PeftError, match="base_weight="):
        load_peft(directory, toy.sites)
    _, back = load_peft(directory, toy.sites, base_weight=toy.weights.__getitem__)
    np.testing.assert_array_equal(back["lm_head"]["a"], adapter["lm_head"]["a"])
    narrow = lambda name: toy.weights[name].astype(jnp.bfloat16)  # noqa: E731
    load_peft(directory, toy.sites, base_weight=narrow)
    with pytest.raises(PeftError, match="another base"):
        load_peft(directory, toy.sites, base_weight=lambda name: toy.weights[name] + 1.0)


def test_a_directory_is_whole_or_not_there(toy, saved, tmp_path, monkeypatch):
    directory, cohort, adapter = saved
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(PeftError, match=r"exists.*overwrite=True"):
        _save(directory, cohort, adapter)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("popax.adapters.peft.os.fsync", full)
        with pytest.raises(PeftError, match="No space left"):
            _save(directory, cohort, adapter, overwrite=True)
        with pytest.raises(PeftError, match="No space left"):
            _save(tmp_path / "fresh", cohort, adapter)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

    other = _random(cohort, seed=1)
    assert _save(directory, cohort, other, overwrite=True) == directory
    np.testing.assert_array_equal(
        load_peft(directory, toy.sites)[1]["layers.attn.q_proj"]["a"], other["layers.attn.q_proj"]["a"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(PeftError, match=r"notes\.txt"):
        _save(directory, cohort, adapter, overwrite=True)
    assert (directory / "notes.txt").read_text() == "mine"


def test_refuses_adapters_that_do_not_fit(toy, tmp_path):
    cohort = toy.cohort()
    adapter = _random(cohort)
    missing = {name: leaves for name, leaves in adapter.items() if name != "lm_head"}
    garbage = jax.tree.map(jnp.ones_like, adapter)
    elsewhere = dataclasses.replace(cohort.config, alpha=1.25)
    for word, tree, config in (
        ("does not fit", missing, cohort.config),
        ("beyond it", garbage, cohort.config),
        ("scale", adapter, elsewhere),
    ):
        with pytest.raises(PeftError, match=word):
            save_peft(tmp_path / "a", tree, config=config, specs=cohort.specs)
    info = dataclasses.replace(toy.sites["lm_head"], name="vision.proj")
    outside = Cohort.of(AdapterConfig(targets=("vision.proj",)), {"vision.proj": info})
    with pytest.raises(PopaxError, match=r"vision\.proj"):
        _save(tmp_path / "a", outside, _random(outside))
    assert not any(tmp_path.iterdir())


def test_a_rank_beyond_the_model_is_refused(toy, saved):
    directory, *_ = saved
    _edit(directory, r=9)
    _edit_tensors(
        directory,
        lambda tensors: tensors.update(
            {k: np.ones((9, v.shape[1]) if "lora_A" in k else (v.shape[0], 9), np.float32) for k, v in tensors.items()}
        ),
    )
    with pytest.raises(PeftError, match="rank 9"):
        load_peft(directory, toy.sites)
