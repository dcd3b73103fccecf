"""What popax writes of methods that PEFT has in a form of its own, read by peft: the same logits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind
from popax.adapters.base import ALL_LINEAR, AdapterConfig, TargetRule
from popax.adapters.cohort import Cohort
from popax.adapters.peft import load_peft, save_peft
from popax.errors import PeftError
from popax.modeling.base import load_base

peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 11))
MIXED = (
    TargetRule(pattern=r"layers\.1\.attn\..*", rank=2, alpha=3.0),
    TargetRule(pattern=r"layers\.[02]\.mlp\.up_proj", rank=0),
    TargetRule(pattern=ALL_LINEAR),
)
CONFIGS = {
    "dora": {"method": "dora", "rank": 4, "alpha": 8.0, "targets": MIXED},
    "ia3": {"method": "ia3", "targets": MIXED},
    "prompt": {"method": "prompt", "rank": 5},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads)).eval()
    place = tmp_path_factory.mktemp("llama")
    model.save_pretrained(place)
    return model, load_base(place), place


@pytest.mark.parametrize("method", CONFIGS)
def test_peft_reads_what_popax_writes(pair, method, tmp_path):
    model, base, place = pair
    cohort = Cohort.of(AdapterConfig(**CONFIGS[method]), base.model.sites())
    shared = cohort.shared(*base.model.site_arrays(base.params))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    adapter = cohort.init(jax.random.key(0))
    for name, leaves in adapter.items():
        live = np.arange(cohort.specs[name].rank) < np.asarray(cohort.specs[name].ranks)[:, None]
        for leaf in sorted(set(leaves) - {"a"}):
            noise = 0.1 * jax.random.normal(next(keys), leaves[leaf].shape)
            # Zero beyond each layer's rank, as training leaves it.
            leaves[leaf] = jnp.where(live[..., None] if leaf == "b" else live[:, :1], noise, 0.0)
    adapter = cohort.refreshed(adapter, shared, lambda site: base.model.site_weight(base.params, site))
    own = base.model(base.params, jnp.asarray(TOKENS, jnp.int32), adapt=bind(cohort, adapter, shared))
    directory = save_peft(
        tmp_path / "adapter", adapter, config=cohort.config, specs=cohort.specs, shared=shared, base_name=str(place)
    )
    copy = transformers.LlamaForCausalLM.from_pretrained(place).eval()
    wrapped = peft.PeftModel.from_pretrained(copy, str(directory)).eval()
    with torch.no_grad():
        theirs = wrapped(torch.asarray(TOKENS)).logits.numpy()[:, -TOKENS.shape[1] :]
        plain = model(torch.asarray(TOKENS)).logits.numpy()
    np.testing.assert_allclose(own, theirs, atol=1e-4, rtol=1e-4)
    assert np.abs(theirs - plain).max() > 0.1
    # What popax wrote is what peft itself would write of it, name by name.
    wrapped.save_pretrained(tmp_path / "theirs")
    kinds = [json.loads((tmp_path / where / "adapter_config.json").read_text()) for where in ("adapter", "theirs")]
    assert kinds[0]["peft_type"] == kinds[1]["peft_type"]
    weight, bias = base.model.site_arrays(base.params)
    for where in ("adapter", "theirs"):
        config, back = load_peft(tmp_path / where, base.model.sites(), base_weight=weight, base_bias=bias)
        again = Cohort.of(config, base.model.sites())
        assert (config.method, again.specs) == (method, cohort.specs)
        jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6), back, adapter)
    with pytest.raises(PeftError, match="base_weight="):
        load_peft(directory, base.model.sites())


@pytest.mark.parametrize("targets", [None, ["q_proj", "up_proj"]], ids=["peft's own", "none inside"])
def test_what_peft_writes_of_gains_means_the_same_here(pair, tmp_path, targets):
    """(IA)^3 as peft configures a Llama: a gain on what enters down_proj, which is popax's on what up_proj puts out."""
    _, base, place = pair
    inner = {"target_modules": targets, "feedforward_modules": []} if targets else {}
    copy = transformers.LlamaForCausalLM.from_pretrained(place).eval()
    wrapped = peft.get_peft_model(copy, peft.IA3Config(task_type="CAUSAL_LM", **inner)).eval()
    torch.manual_seed(2)
    for name, value in wrapped.named_parameters():
        if "ia3_l" in name:
            value.data = 1.0 + 0.3 * torch.randn_like(value)
    wrapped.save_pretrained(tmp_path / "theirs")
    weight, bias = base.model.site_arrays(base.params)
    config, adapter = load_peft(tmp_path / "theirs", base.model.sites(), base_weight=weight, base_bias=bias)
    cohort = Cohort.of(config, base.model.sites())
    assert "layers.mlp.up_proj" in cohort.specs
    assert "layers.mlp.down_proj" not in cohort.specs
    shared = cohort.shared(weight, bias)
    with torch.no_grad():
        theirs = wrapped(torch.asarray(TOKENS)).logits.numpy()
    own = base.model(base.params, jnp.asarray(TOKENS, jnp.int32), adapt=bind(cohort, adapter, shared))
    np.testing.assert_allclose(own, theirs, atol=1e-4, rtol=1e-4)
    # What enters o_proj is nothing that a site puts out; and a site has one gain.
    for changes, words in (
        ({"feedforward_modules": ["k_proj", "q_proj"]}, "gain on what enters it"),
        ({"target_modules": ["o_proj"]}, "no module of its config"),
    ):
        record = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text()) | changes
        (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(record))
        with pytest.raises(PeftError, match=words):
            load_peft(tmp_path / "theirs", base.model.sites(), base_weight=weight, base_bias=bias)
