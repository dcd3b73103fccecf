"""The same weights in transformers and here: logits, decoding through the cache, sharded loading."""

import functools
import json

import jax
import numpy as np
import pytest

from popax.modeling.base import Base, load_base
from popax.modeling.cache import init_cache
from popax.modeling.rope import frequencies

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity
CLOSE = {"rtol": 0, "atol": 1e-4}
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # far from the identity, so that errors show
    "tie_word_embeddings": False,
}
ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {**ROPE, "rope_type": "yarn"}
EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True}
QWEN3_MOE = {**EXPERTS, "head_dim": 32, "num_experts": 8}
LATENT = {"q_lora_rank": 20, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
DEEPSEEK = {
    **(EXPERTS | LATENT),
    **{"num_key_value_heads": 4, "n_routed_experts": 16, "n_shared_experts": 2, "first_k_dense_replace": 1},
    **{"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
}
KIMI_K2 = {
    **DEEPSEEK,
    **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "routed_scaling_factor": 2.827},
    "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 1.0, "beta_slow": 1.0},
}
FAMILIES = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3_1": ("Llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama_linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "qwen2": ("Qwen2", {}),
    "qwen2_yarn_tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {**YARN, "truncate": False}}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3_tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", QWEN3_MOE),
    "qwen3_moe_sums_not_one": ("Qwen3Moe", QWEN3_MOE | {"norm_topk_prob": False, "num_experts_per_tok": 1}),
    "qwen3_moe_first_layer_dense": ("Qwen3Moe", QWEN3_MOE | {"mlp_only_layers": [0]}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
    "deepseek_v3_no_query_latent": ("DeepseekV3", DEEPSEEK | {"q_lora_rank": None, "first_k_dense_replace": 0}),
    "deepseek_v3_plain_rope": ("DeepseekV3", DEEPSEEK | {"rope_parameters": None, "rope_interleave": False}),
    "kimi_k2": ("DeepseekV3", KIMI_K2),
    "kimi_k2_biases": ("DeepseekV3", KIMI_K2 | {"attention_bias": True, "norm_topk_prob": False}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(the model in transformers, its directory: one file, or several with an index)."""
    family, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SHAPE | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # which start at zero and one
                parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.add_(0.2 * torch.randn_like(buffer))
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory, **({"max_shard_size": "60KB"} if "qwen" in request.param else {}))
    assert (directory / "model.safetensors.index.json").exists() == ("qwen" in request.param)
    return model, directory


TOKENS = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (3, 40)).astype(np.int32)


def expected(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.asarray(TOKENS, dtype=torch.long)).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def step(model, params, tokens, positions, cache):
    x_BxTxD, cache = model.hidden(params, tokens, positions_BxT=positions, cache=cache)
    return model.logits(params, x_BxTxD), cache


def assert_decodes(base: Base, full: np.ndarray) -> None:
    """Ragged prefill, then steps, against the full forward."""
    lengths = np.array([20, 33, 27], np.int32)
    column = np.arange(36, dtype=np.int32)[None]
    positions = np.where(column < lengths[:, None], column, np.int32(-1))
    logits, cache = step(base.model, base.params, TOKENS[:, :36], positions, init_cache(base.model.config, 3, 40))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], full[row, :length], **CLOSE)
    for offset in range(7):
        position = (lengths + offset)[:, None]
        logits, cache = step(base.model, base.params, np.take_along_axis(TOKENS, position, 1), position, cache)
        np.testing.assert_allclose(logits, np.take_along_axis(full, position[..., None], 1), **CLOSE)


def test_logits_and_cached_decoding_equal_transformers(pair):
    model, directory = pair
    base, full = load_base(directory), expected(model)
    assert np.abs(full).max() > 1
    np.testing.assert_allclose(jax.jit(base.model)(base.params, TOKENS), full, **CLOSE)
    assert_decodes(base, full)


def test_loading_onto_a_mesh_gives_the_same_numbers(pair, mesh):
    model, directory = pair
    alone, spread = load_base(directory), load_base(directory, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, alone.params, spread.params)
    assert spread.digest == alone.digest
    assert spread.params["embed"]["embedding"].sharding.shard_shape((96, 64)) == (48, 16)
    np.testing.assert_allclose(jax.jit(spread.model)(spread.params, TOKENS), expected(model), **CLOSE)


def test_rope_frequencies_equal_transformers(pair):
    model, directory = pair
    ours, factor = frequencies(load_base(directory).model.config)
    np.testing.assert_allclose(ours, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    assert factor == pytest.approx(model.model.rotary_emb.attention_scaling)


def test_the_keys_of_transformers_4_load_too(pair):
    _, directory = pair
    path = directory / "config.json"
    text = path.read_text()
    record = json.loads(text)
    before = load_base(directory)
    rope = record.pop("rope_parameters")
    record["rope_theta"], record["torch_dtype"] = rope.pop("rope_theta"), record.pop("dtype")
    record["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    try:
        path.write_text(json.dumps(record))
        after = load_base(directory)
    finally:
        path.write_text(text)
    assert (after.model, after.digest) == (before.model, before.digest)


def test_bfloat16_files_load_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    base = load_base(tmp_path)
    assert (base.model.config.param_dtype, base.model.config.dtype) == ("bfloat16", "bfloat16")
    stored = model.lm_head.weight.detach().view(torch.int16).numpy()
    np.testing.assert_array_equal(np.asarray(base.params["lm_head"]["kernel"]).T.view(np.int16), stored)
    wide = load_base(tmp_path, param_dtype="float32")
    assert (wide.model.config.dtype, wide.digest) == ("float32", base.digest)
