"""DeepSeek-V3's 8-bit files: values times a factor for each block of 128 x 128; experts read where they lie."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import save_file

from popax.errors import CheckpointError
from popax.modeling import hf, shards, stored_weights
from popax.modeling.base import load_base
from popax.modeling.block_config import MLAConfig, MoEConfig
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.modeling.tensor_files import StoredTensor
from popax.trees import flatten_named

E, LAYERS = 4, 2
CONFIG = ModelConfig(
    **{"vocab_size": 64, "embed_dim": 160, "ffw_dim": 136, "num_layers": LAYERS, "num_heads": 2, "num_kv_heads": 2},
    **{"head_dim": 12, "max_seq_len": 32, "rope_layout": "interleaved", "norm_eps": 1e-6},
    moe=MoEConfig(
        **{"num_experts": E, "experts_per_token": 2, "expert_ffw_dim": 144, "shared_ffw_dim": 144},
        **{"first_dense_layers": 1, "scoring": "sigmoid", "correction_bias": True},
    ),
    mla=MLAConfig(kv_latent_dim=24, nope_head_dim=8, rope_head_dim=4, v_head_dim=8),
)
RECORD = {
    "architectures": ["DeepseekV3ForCausalLM"],
    **{"vocab_size": 64, "hidden_size": 160, "intermediate_size": 136, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 32, "torch_dtype": "float32"},
    **{"n_routed_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": 144, "n_shared_experts": 1},
    **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    **{"norm_topk_prob": True, "q_lora_rank": None, "kv_lora_rank": 24, "qk_nope_head_dim": 8},
    **{"qk_rope_head_dim": 4, "v_head_dim": 8, "num_nextn_predict_layers": 1},
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}


def blocks_of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(8-bit values, factors, what both mean), by a loop over the blocks."""
    grid = [range(0, size, 128) for size in weight.shape]
    scales = np.zeros([len(starts) for starts in grid], np.float32)
    values, meant = np.zeros(weight.shape, jnp.float8_e4m3fn), np.zeros(weight.shape, np.float32)
    for i, row in enumerate(grid[0]):
        for j, column in enumerate(grid[1]):
            part = (slice(row, row + 128), slice(column, column + 128))
            scales[i, j] = np.abs(weight[part]).max() / 448
            values[part] = (weight[part] / scales[i, j]).astype(jnp.float8_e4m3fn)
            meant[part] = values[part].astype(np.float32) * scales[i, j]
    return values, scales, meant


@pytest.fixture(scope="module")
def files() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(tensors, the params that they mean): linear layers in 8 bits, a prediction layer behind the last."""
    model = Model(CONFIG)
    tensors, meant = {}, {}
    for name, leaf in flatten_named(model.init(jax.random.key(0))).items():
        stack, value = model.stacks.get(name.partition("/")[0]), np.array(leaf)
        lead = (stack is not None) + ("/experts/" in name)
        meant[name] = value
        for index in np.ndindex(value.shape[:lead]):
            layer, *expert = index if lead else (0,)
            theirs = hf.hf_name(name, layer + (stack.first_layer if stack else 0), *expert)
            one = value[index].T if name.endswith("/kernel") else value[index]
            if "_proj" in theirs:
                tensors[theirs], tensors[theirs + "_scale_inv"], exact = blocks_of(one)
                value[index] = exact.T
            else:
                tensors[theirs] = np.ascontiguousarray(one)
    tensors[f"model.layers.{LAYERS}.eh_proj.weight"] = np.zeros((4, 4), np.float32)
    return tensors, meant


@pytest.fixture(scope="module")
def stored(files, tmp_path_factory):
    """(directory, the params that its files mean)."""
    directory = tmp_path_factory.mktemp("fp8")
    (directory / "config.json").write_text(json.dumps(RECORD))
    save_file(files[0], directory / "model.safetensors")
    return directory, files[1]


def test_what_is_read_is_values_times_factors(stored):
    directory, meant = stored
    base = load_base(directory)
    assert base.model.config == CONFIG
    for name, leaf in flatten_named(base.params).items():
        np.testing.assert_array_equal(leaf, meant[name], err_msg=name)
    half = load_base(directory, param_dtype="bfloat16")
    assert half.digest == base.digest  # of what is stored
    assert half.params["layers"]["moe"]["router"]["correction_bias"].dtype == jnp.float32
    kernel = half.params["layers"]["moe"]["experts"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, meant["layers/moe/experts/up_proj/kernel"].astype(jnp.bfloat16))


def test_the_digest_sees_the_factors(stored, tmp_path):
    directory, _ = stored
    data = bytearray((directory / "model.safetensors").read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = header["model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"]["data_offsets"][0]
    data[8 + int.from_bytes(data[:8], "little") + start] ^= 1
    (tmp_path / "config.json").write_text(json.dumps(RECORD))
    (tmp_path / "model.safetensors").write_bytes(data)
    assert load_base(tmp_path).digest != load_base(directory).digest


def test_a_device_reads_its_own_experts_only(stored, monkeypatch):
    directory, meant = stored
    mesh = Mesh(np.array(jax.devices()[:E]), ("expert",))
    read, opened, read_shard = StoredTensor.read, [], shards.read_shard

    def recorded(*arguments):
        opened.append(set())
        return read_shard(*arguments)

    def noted(tensor, index):
        if opened:
            opened[-1].add(tensor.name)
        return read(tensor, index)

    monkeypatch.setattr(stored_weights, "read_shard", recorded)
    monkeypatch.setattr(StoredTensor, "read", noted)
    base = load_base(directory, mesh=mesh)
    experts = [names for names in opened if any(".experts." in name for name in names)]
    assert len(experts) == 3 * E  # gate, up and down on each device
    assert all(len({name.split(".experts.")[1].split(".")[0] for name in names}) == 1 for names in experts)
    for name, leaf in flatten_named(base.params).items():
        np.testing.assert_array_equal(leaf, meant[name], err_msg=name)
    assert base.params["layers"]["moe"]["experts"]["up_proj"]["kernel"].sharding.shard_shape((1, E, 160, 144))[1] == 1


def test_rows_that_are_read_and_exchanged_are_the_same_base(stored):
    directory, meant = stored
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("population", "expert", "tensor"))
    model = Model(CONFIG)
    weights = hf.open_weights(directory, model)
    params, digest = weights.load(mesh=mesh, exchange=True)
    assert digest == weights.digest()
    wanted = flatten_named(model.shardings(mesh))
    for name, leaf in flatten_named(params).items():
        np.testing.assert_array_equal(leaf, meant[name], err_msg=name)
        assert leaf.sharding.is_equivalent_to(wanted[name], leaf.ndim), name


def test_factors_that_are_missing_or_do_not_fit_are_named(files, tmp_path):
    tensors, name = files[0], "model.layers.1.self_attn.o_proj.weight_scale_inv"
    (tmp_path / "config.json").write_text(json.dumps(RECORD))
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"missing: {name}"):
        load_base(tmp_path)
    save_file(tensors | {name: np.ones((3, 1), np.float32)}, tmp_path / "model.safetensors")
    message = r"o_proj.weight_scale_inv is \(3, 1\): blocks of 128 x 128 .* need \(2, 1\)"
    with pytest.raises(CheckpointError, match=message):
        load_base(tmp_path)


def test_layers_behind_the_last_are_the_predictors_only(stored, tmp_path):
    directory, _ = stored
    (tmp_path / "config.json").write_text(json.dumps(RECORD | {"num_nextn_predict_layers": 0}))
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"not the model's: model\.layers\.{LAYERS}\.eh_proj\.weight"):
        load_base(tmp_path)


def test_a_mesh_of_experts_computes_the_same_logits(stored):
    directory, _ = stored
    base = load_base(directory)
    tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, 64, jnp.int32)
    alone = jax.jit(base.model)(base.params, tokens)
    mesh = Mesh(np.array(jax.devices()).reshape(2, E), ("population", "expert"))
    spread = load_base(directory, mesh=mesh)
    with jax.set_mesh(mesh):
        together = jax.jit(dataclasses.replace(base.model))(spread.params, tokens)
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
