"""The same logits from peft and from popax, for adapters made on either side (issue 2, acceptance 4)."""

import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from popax.adapters.apply import bind
from popax.adapters.base import ALL_LINEAR, AdapterConfig, TargetRule, resolve
from popax.adapters.cohort import Cohort
from popax.adapters.peft import load_peft, save_peft
from popax.errors import PeftError
from popax.modeling.base import load_base
from popax.types import NO_ADAPT

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 11))
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES = {"Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8}}
MIXED = (
    TargetRule(pattern=r"layers\.1\.attn\..*", rank=2, alpha=3.0),
    TargetRule(pattern=r"layers\.[02]\.mlp\.up_proj", rank=0),
    TargetRule(pattern=r"layers\.mlp\.down_proj", rank=7, alpha=20.0),
    TargetRule(pattern="lm_head", rank=5, alpha=4.0),
    TargetRule(pattern=ALL_LINEAR),
)
POPAX_CONFIGS = {
    "uniform": {"targets": (TargetRule(pattern=ALL_LINEAR),)},
    "subset": {"targets": (TargetRule(pattern=r"layers\.attn\.[qv]_proj"),)},
    "mixed": {"targets": MIXED},
    "mixed_rslora": {"targets": MIXED, "alpha_rule": "sqrt_rank"},
    "mixed_constant": {"targets": MIXED, "alpha_rule": "constant", "alpha": 0.7},
    "lora_xs": {"targets": MIXED, "method": "lora_xs"},
}
PATTERNS = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj", "model.layers.2.self_attn.o_proj", "up_proj"],
    "rank_pattern": {"model.layers.1.self_attn.q_proj": 2, r"layers\.[02]\.mlp\.up_proj": 6, "v_proj": 3},
    "alpha_pattern": {r"^model\.layers\.2\..*_proj": 16, "q_proj": 1},
}
PEFT_CONFIGS = {
    "all_linear": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "patterns": PATTERNS,
    "patterns_rslora": {**PATTERNS, "use_rslora": True},
    "regex": {"r": 4, "lora_alpha": 8, "target_modules": r"model\.layers\.[01]\.mlp\.(up|down)_proj"},
    "some_layers": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "all_but": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "exclude_modules": ["k_proj", "o_proj"]},
    "head": {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"], "rank_pattern": {"lm_head": 9}},
}


def _cases(configs, everywhere):
    """Every config on Llama; the names do not differ between families, so a few of them on the others."""
    return [(family, case) for family in FAMILIES for case in configs if family == "Llama" or case in everywhere]


@functools.cache
def _torch_model(family):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE, **FAMILIES[family], tie_word_embeddings=False)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(a transformers model, the same as a popax base)."""
    model = _torch_model(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    base = load_base(directory)
    np.testing.assert_allclose(_popax(base), _torch(model), atol=1e-4)
    return model, base


def _torch(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS)).logits.float().numpy()


@functools.cache
def _jitted(model):
    return jax.jit(lambda params, adapt: model(params, jnp.asarray(TOKENS, jnp.int32), adapt=adapt))


def _popax(base, cohort=None, adapter=None, shared=None):
    adapt = NO_ADAPT if cohort is None else bind(cohort, adapter, shared or {})
    return np.asarray(_jitted(base.model)(base.params, adapt))


def _read_by_peft(model, directory):
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(directory)).eval()


def _random(cohort, seed=0):
    """A state off its start, with the zeros beyond each rank that training leaves there."""
    start = cohort.init(jax.random.key(seed))
    if "core" in next(iter(start.values())):
        keys = iter(jax.random.split(jax.random.key(seed), 99))
        return jax.tree.map(lambda leaf: 0.2 * jax.random.normal(next(keys), leaf.shape), start)
    rng = np.random.default_rng(seed)
    for name, leaves in start.items():
        spec = cohort.specs[name]
        keep = np.arange(spec.rank) < np.asarray(spec.ranks)[:, None]
        keep = keep if spec.info.layers else keep[0]
        leaves["b"] = jnp.asarray(0.2 * rng.standard_normal(leaves["b"].shape) * keep[..., None], jnp.float32)
    return start


@pytest.mark.parametrize(("pair", "case"), _cases(POPAX_CONFIGS, everywhere=("mixed",)), indirect=["pair"])
def test_popax_to_peft(pair, case, tmp_path):
    model, base = pair
    cohort = Cohort.of(AdapterConfig(**({"rank": 4, "alpha": 8.0} | POPAX_CONFIGS[case])), base.model.sites())
    shared = cohort.shared(lambda site: base.model.site_weight(base.params, site))
    adapter = _random(cohort)
    directory = save_peft(tmp_path / "adapter", adapter, config=cohort.config, specs=cohort.specs, shared=shared)
    ours = _popax(base, cohort, adapter, shared)
    assert np.max(np.abs(ours - _popax(base))) > 0.05
    np.testing.assert_allclose(ours, _torch(_read_by_peft(model, directory)), atol=1e-4, rtol=1e-4)
    config, back = load_peft(directory, base.model.sites())
    np.testing.assert_allclose(_popax(base, Cohort.of(config, base.model.sites()), back), ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("pair", "case"), _cases(PEFT_CONFIGS, everywhere=("patterns",)), indirect=["pair"])
def test_peft_to_popax(pair, case, tmp_path):
    """Trained by peft for a few steps, its start random in both factors."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model, base = pair
    torch.manual_seed(1)
    settings = {"init_lora_weights": False, "task_type": "CAUSAL_LM", **PEFT_CONFIGS[case]}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    optimizer = torch.optim.AdamW([weight for weight in theirs.parameters() if weight.requires_grad], lr=0.01)
    tokens = torch.as_tensor(TOKENS)
    for _ in range(3):
        optimizer.zero_grad()
        theirs(tokens, labels=tokens).loss.backward()
        optimizer.step()
    theirs.eval().save_pretrained(tmp_path)
    weight = functools.partial(base.model.site_weight, base.params)
    config, adapter = load_peft(tmp_path, base.model.sites(), base_weight=weight)
    cohort = Cohort.of(config, base.model.sites())
    ours = _popax(base, cohort, adapter)
    assert np.max(np.abs(ours - _popax(base))) > 0.05
    np.testing.assert_allclose(ours, _torch(theirs), atol=1e-4, rtol=1e-4)
    _assert_scalings(theirs, cohort)
    directory = save_peft(tmp_path / "again", adapter, config=config, specs=cohort.specs)
    np.testing.assert_allclose(_torch(_read_by_peft(model, directory)), _torch(theirs), atol=1e-5, rtol=1e-5)


def _assert_scalings(theirs, cohort):
    """Each module's rank and scale, as peft itself computed them."""
    found = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if hasattr(module, "scaling") and hasattr(module, "lora_A")
    }
    blocks = {"attn": "self_attn", "mlp": "mlp"}
    ours = {}
    for name, spec in cohort.specs.items():
        for layer, pair in enumerate(zip(spec.ranks, spec.scales, strict=True)):
            if pair[0]:
                _, block, leaf = name.split(".") if spec.info.layers else ("", "", name)
                ours[f"model.layers.{layer}.{blocks[block]}.{leaf}" if block else leaf] = pair
    assert ours == found


def test_trained_by_popax_read_by_peft(pair, tmp_path):
    """A few optax steps on next-token loss, rank and alpha mixed; peft sees the same loss fall."""
    model, base = pair
    cohort = Cohort.of(AdapterConfig(rank=4, alpha=8.0, targets=MIXED), base.model.sites())
    tokens, optimizer = jnp.asarray(TOKENS, jnp.int32), optax.adam(0.02)

    def loss_of(adapter):
        logits = base.model(base.params, tokens, adapt=bind(cohort, adapter, {}))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]))

    @jax.jit
    def step(adapter, state):
        with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
            loss, gradient = jax.value_and_grad(loss_of)(adapter)
            updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(adapter, updates), state, loss

    adapter = cohort.init(jax.random.key(0))
    state, losses = optimizer.init(adapter), []
    for _ in range(8):
        adapter, state, loss = step(adapter, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    directory = save_peft(tmp_path / "adapter", adapter, config=cohort.config, specs=cohort.specs)
    ours = _popax(base, cohort, adapter)
    np.testing.assert_allclose(_torch(_read_by_peft(model, directory)), ours, atol=1e-4, rtol=1e-4)
    config, back = load_peft(directory, base.model.sites())
    assert {n: (s.ranks, s.scales) for n, s in resolve(config, base.model.sites()).items()} == {
        n: (s.ranks, s.scales) for n, s in cohort.specs.items()
    }
    jax.tree.map(np.testing.assert_array_equal, back, adapter)


@pytest.mark.parametrize("pair", ["Llama"], indirect=True)
def test_bfloat16_directories_keep_their_bits(pair, tmp_path):
    model, base = pair
    cohort = Cohort.of(AdapterConfig(rank=4, targets=MIXED, dtype="bfloat16"), base.model.sites())
    adapter = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), _random(cohort))
    directory = save_peft(tmp_path / "adapter", adapter, config=cohort.config, specs=cohort.specs)
    theirs = _read_by_peft(model, directory)
    np.testing.assert_allclose(_torch(theirs), _popax(base, cohort, adapter), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True}, "base_weight"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embedding"),
    ],
)
def test_what_peft_writes_and_popax_has_not_is_refused(settings, word, tmp_path):
    peft = pytest.importorskip("peft")
    model = _torch_model("Llama")
    config = peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings))
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(PeftError, match=word):
        load_peft(tmp_path / "adapter", load_base(tmp_path / "base").model.sites())


def test_every_key_that_peft_writes_is_known(tmp_path):
    """A default LoraConfig of the installed peft is read; its keys are all understood, without effect, or empty."""
    peft = pytest.importorskip("peft")
    model = _torch_model("Llama")
    peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "base")
    config, _ = load_peft(tmp_path, load_base(tmp_path / "base").model.sites())
    assert dataclasses.asdict(config)["rank"] == json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
