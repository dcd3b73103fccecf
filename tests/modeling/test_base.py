"""Bases on disk: Hugging Face directories streamed shard by shard, popax's own directories, digests, damage."""

import dataclasses
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from popax.errors import CheckpointError, ConfigError, SiteError
from popax.modeling import hf, shards, stored_weights
from popax.modeling.base import RECORD, load_base, new_base, open_base, save_base
from popax.modeling.digest import digest_params
from popax.modeling.model import Model
from popax.sharding import ShardingRules
from popax.trees import flatten_named
from tests.shared_data import SHARED, needs_shared

TINYSTORIES = SHARED / "tinystories_656k_hf"
FILE = "model.safetensors"


def hf_record(config, **changes) -> dict:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.ffw_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": False,
        **changes,
    }


def hf_tensors(params) -> dict[str, np.ndarray]:
    tensors = {}
    for name, leaf in flatten_named(params).items():
        layers = enumerate(np.asarray(leaf)) if name.startswith("layers/") else [(None, np.asarray(leaf))]
        for layer, value in layers:
            stored = value.T if name.endswith("/kernel") else value
            tensors[hf.hf_name(name, layer)] = np.ascontiguousarray(stored)
    return tensors


@pytest.fixture
def directory(tiny, tmp_path) -> Path:
    """The tiny model as a Hugging Face directory of one file."""
    (tmp_path / "config.json").write_text(json.dumps(hf_record(tiny.config)))
    save_file(hf_tensors(tiny.params), tmp_path / FILE)
    return tmp_path


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "base"
    save_base(path, new_base(tiny.model, tiny.params, source="a test"))
    return path


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def split(directory: Path, parts: int = 3) -> None:
    """One file into several with an index."""
    tensors = load_file(directory / FILE)
    (directory / FILE).unlink()
    weight_map = {name: f"model-{at % parts}.safetensors" for at, name in enumerate(tensors)}
    for file in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name, where in weight_map.items() if where == file}, directory / file)
    (directory / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change(directory: Path, **changes: np.ndarray | None) -> None:
    tensors = {**load_file(directory / FILE), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, directory / FILE)


def test_one_file_several_files_and_a_mesh_are_the_same_base(tiny, directory, mesh):
    whole = load_base(directory)
    same(whole.params, tiny.params)
    assert whole.model == tiny.model
    split(directory)
    several = load_base(directory, mesh=mesh)
    same(several.params, tiny.params)
    assert several.digest == whole.digest


def test_the_digest_follows_weights_and_semantics_only(directory):
    def digest(**changes) -> str:
        record = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps(record))
        return load_base(directory).digest

    first = digest()
    assert load_base(directory, dtype="bfloat16", param_dtype="bfloat16").digest == first
    assert digest(max_position_embeddings=9) == first
    assert digest(rms_norm_eps=1e-3) != first
    assert digest(rms_norm_eps=1e-5) == first
    change(directory, **{"model.norm.weight": np.full(32, 1.5, np.float32)})
    assert digest() != first


@needs_shared("tinystories_656k_hf")
def test_tinystories_ties_its_embedding_to_the_head_it_stores(mesh):
    base = load_base(TINYSTORIES)
    stored = load_file(TINYSTORIES / FILE)["lm_head.weight"]
    np.testing.assert_array_equal(base.params["embed"]["embedding"], stored)
    assert "lm_head" not in base.params
    assert base.model.num_params == 656_000
    same(load_base(TINYSTORIES, mesh=mesh).params, base.params)


def test_tied_embeddings_stored_twice_must_be_equal(tiny, directory):
    (directory / "config.json").write_text(json.dumps(hf_record(tiny.config, tie_word_embeddings=True)))
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings, but lm_head\.weight and .*embed_tokens.* differ"):
        load_base(directory)
    change(directory, **{"lm_head.weight": np.asarray(tiny.params["embed"]["embedding"])})
    assert "lm_head" not in load_base(directory).params


def test_each_device_reads_its_own_shard_and_nothing_more(tiny, directory, mesh, monkeypatch):
    buffers, live = [], []
    read_shard, device_put = shards.read_shard, jax.device_put

    def recorded(*arguments):
        buffers.append(read_shard(*arguments))
        live.append(buffers[-1].nbytes)
        return buffers.pop()

    monkeypatch.setattr(stored_weights, "read_shard", recorded)
    monkeypatch.setattr(jax, "device_put", lambda value, device=None: device_put(np.array(value), device))
    params = load_base(directory, mesh=mesh).params
    leaves = jax.tree.leaves(params)
    total = sum(leaf.nbytes for leaf in leaves)
    assert sum(live) == total  # a shard that several devices have is read once
    assert max(live) == max(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert max(live) < total / 20


def test_a_layer_s_slice_touches_only_that_part_of_the_file(tiny, directory):
    """The views that are copied out of the files have the shard's own shapes."""
    source = hf.open_weights(directory, tiny.model).sources["layers/mlp/up_proj/kernel"]
    index = (slice(1, 3), slice(8, 16), slice(0, 24))
    with ThreadPoolExecutor() as pool:
        shard = shards.read_shard(source, (3, 32, 48), np.dtype(np.float32), pool, index)
    np.testing.assert_array_equal(shard, np.asarray(tiny.params["layers"]["mlp"]["up_proj"]["kernel"])[index])
    view = source.tensors[1].read(index[1:][::-1])
    assert (view.shape, view.strides, view.flags.writeable) == ((24, 8), (32 * 4, 4), False)


def test_a_truncated_file_is_named_with_its_sizes(directory):
    path = directory / FILE
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    message = rf"{FILE} is truncated: {len(data) - 100} bytes, its header says {len(data)}; download it again"
    with pytest.raises(CheckpointError, match=message):
        load_base(directory)
    for kept in (0, 7, 50):
        path.write_bytes(data[:kept])
        with pytest.raises(CheckpointError, match=f"{FILE} is truncated or no safetensors file: it has {kept} bytes"):
            load_base(directory)
    path.write_bytes(data + b"more")
    with pytest.raises(CheckpointError, match="has bytes after its last tensor"):
        load_base(directory)
    path.write_bytes(data[:8] + b"]" + data[9:])
    with pytest.raises(CheckpointError, match="the header is damaged"):
        load_base(directory)


def test_tensors_that_do_not_fit_are_named(directory):
    change(
        directory,
        **{
            "model.layers.1.self_attn.q_proj.weight": None,
            "model.layers.2.mlp.up_proj.weight": np.zeros((48, 31), np.float32),
            "model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32),
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        load_base(directory)
    message = str(caught.value)
    assert "missing: model.layers.1.self_attn.q_proj.weight;" in message
    assert "model.layers.2.mlp.up_proj.weight is (48, 31), the config asks for (48, 32);" in message
    assert "not the model's: model.layers.0.self_attn.q_proj.bias." in message
    assert "inv_freq" not in message


def test_tensors_of_integers_are_refused(directory):
    change(directory, **{"model.norm.weight": np.ones(32, np.int8)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored as I8; popax loads F64, F32"):
        load_base(directory)


def test_an_index_that_lies_is_refused(directory):
    split(directory)
    index = directory / f"{FILE}.index.json"
    record = json.loads(index.read_text())
    name = "model.norm.weight"
    home = record["weight_map"][name]
    for where, message in (
        ("model-9.safetensors", r"names files that are not there: model-9\.safetensors"),
        ("../model-0.safetensors", "outside its directory"),
        ("model-0.safetensors" if home != "model-0.safetensors" else "model-1.safetensors", "files that lack them"),
    ):
        record["weight_map"][name] = where
        index.write_text(json.dumps(record))
        with pytest.raises(CheckpointError, match=message):
            load_base(directory)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="is not an index"):
        load_base(directory)


def test_a_base_is_known_without_loading_it(tiny, directory, saved, monkeypatch):
    loaded = {place: load_base(place) for place in (directory, saved)}
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("weights were put on a device"))
    opened = {place: open_base(place) for place in loaded}
    kernel = tiny.model.site_weight(tiny.params, "layers.attn.q_proj")
    np.testing.assert_array_equal(opened[directory].site_weight("layers.attn.q_proj"), kernel)
    monkeypatch.undo()
    np.testing.assert_array_equal(opened[saved].site_weight("layers.attn.q_proj"), kernel)
    for place, info in opened.items():
        base = loaded[place]
        assert (info.model, info.digest, info.source) == (base.model, base.digest, base.source)
        with pytest.raises(SiteError, match="no linear map 'elsewhere'"):
            info.site_weight("elsewhere")
    with pytest.raises(CheckpointError, match=r"nowhere is not a directory with config\.json"):
        open_base(directory / "nowhere")


def test_what_is_no_base_is_said_to_be_none(directory, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere is not a directory with config\.json"):
        load_base(tmp_path / "nowhere")
    (directory / FILE).rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .*save_pretrained"):
        load_base(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        load_base(directory)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither config\.json"):
        load_base(directory)


def test_a_saved_base_is_restored_bitwise_onto_any_mesh(tiny, saved, mesh, tmp_path):
    base = load_base(saved)
    same(base.params, tiny.params)
    assert (base.model, base.source) == (tiny.model, "a test")
    assert base.digest == digest_params(tiny.params, tiny.config)
    spread = load_base(saved, mesh=mesh)
    same(spread.params, tiny.params)
    assert spread.params["lm_head"]["kernel"].sharding.shard_shape((32, 64)) == (8, 32)
    save_base(tmp_path / "again", spread)
    again = load_base(tmp_path / "again")  # without the mesh it was saved from
    same(again.params, tiny.params)
    assert again.digest == base.digest
    assert len(jax.tree.leaves(again.params)[0].devices()) == 1
    replicated = load_base(saved, mesh=mesh, rules=ShardingRules(rules=(*_no_axes(),)))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(replicated.params))


def _no_axes():
    return [(axis, None) for axis, _ in ShardingRules().rules]


def test_a_saved_base_keeps_the_digest_of_its_origin(directory, tmp_path):
    origin = load_base(directory)
    save_base(tmp_path / "saved", origin)
    restored = load_base(tmp_path / "saved", param_dtype="bfloat16")
    assert restored.digest == origin.digest
    assert restored.model.config.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(restored.params)} == {jnp.dtype("bfloat16")}


def test_a_base_is_not_overwritten_and_half_a_base_is_not_seen(tiny, saved, tmp_path, monkeypatch):
    base = new_base(tiny.model, tiny.params, source="a test")
    with pytest.raises(CheckpointError, match="exists already"):
        save_base(saved, base)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(CheckpointError, match=r"was not written: .*No space left on device"):
        save_base(tmp_path / "new", base)
    assert list(tmp_path.iterdir()) == []


def test_damage_to_a_saved_base_is_named(saved, tmp_path):
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    record = json.loads((copy / RECORD).read_text())
    for content, message in (
        ("{", "is damaged"),
        (json.dumps({"format": 1}), "lacks config, digest, source"),
        (json.dumps(record | {"format": 2}), "format 2, this popax reads 1"),
        (
            json.dumps(record | {"config": record["config"] | {"ffw_dim": 50}}),
            r"down_proj/kernel is \(3, 48, 32\), not \(3, 50",
        ),
    ):
        (copy / RECORD).write_text(content)
        with pytest.raises(CheckpointError, match=message):
            load_base(copy)
    (copy / RECORD).write_text(json.dumps(record))
    shutil.rmtree(copy / "weights")
    with pytest.raises(CheckpointError, match="weights is no Orbax checkpoint"):
        load_base(copy)


def test_a_damaged_array_of_a_saved_base_is_reported(saved, tmp_path):
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    largest = max((copy / "weights").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    # In a process of its own: the reads of the other arrays fail after the first, with nobody waiting for them.
    load = f"from popax.modeling.base import load_base; load_base({str(copy)!r})"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"CheckpointError: {copy}: the weights cannot be read: " in done.stderr


def test_the_digest_of_parameters_sees_every_value_shape_and_dtype(tiny, mesh):
    first = digest_params(tiny.params)
    assert digest_params(jax.device_put(tiny.params, tiny.model.shardings(mesh))) == first
    assert digest_params(jax.tree.map(np.asarray, tiny.params)) == first
    kernel = tiny.model.site_weight(tiny.params, "layers.mlp.up_proj")
    changed = [
        kernel.at[2, 31, 47].add(1e-6),
        kernel.reshape(3, 48, 32),
        kernel.astype(jnp.bfloat16),
    ]
    others = {digest_params({"up_proj": {"kernel": value}}) for value in (kernel, *changed)}
    assert len(others) == 4
    assert digest_params(tiny.params, tiny.config) != first


def test_a_loaded_base_computes_what_it_computed_before(tiny, directory):
    base, tokens = load_base(directory), tiny.tokens(2, 12)
    np.testing.assert_array_equal(tiny.forward(base.params, tokens), tiny.forward(tiny.params, tokens))
    assert dataclasses.replace(base.model.config) == Model(tiny.config).config
