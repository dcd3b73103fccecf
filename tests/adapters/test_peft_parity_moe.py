"""The same logits from peft and from popax on a model of two stacks, latent attention and shared experts."""

import copy

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

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 11)).astype(np.int32)
DEEPSEEK = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2, "moe_intermediate_size": 16},
    **{"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    **{"first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8},
    **{"qk_rope_head_dim": 4, "v_head_dim": 8},
}
# This release of peft turns every target that ends in gate_proj, up_proj or down_proj into the routed experts' fused
# parameters, whatever comes before it: the dense and the shared MLPs of such a model cannot be named to it at all.
ATTENTION = {
    "attention": (r"layers\.\d\.attn\..*",),
    "main_stack": (r"layers\.attn\.(q_a|kv_b|o)_proj",),
    "one_stack_each": (r"dense_layers\.attn\.q_a_proj", r"layers\.attn\.o_proj"),
    "attention_mixed": (
        TargetRule(pattern=r"layers\.0\.attn\.kv_b_proj", rank=2, alpha=3.0),
        TargetRule(pattern=r"layers\.2\.attn\..*", rank=0),
        TargetRule(pattern=r"layers\.attn\.kv_a_proj", rank=3),
        r"layers\.\d\.attn\..*",
    ),
}
TARGETS = ATTENTION | {
    "all_linear": (ALL_LINEAR,),
    "one_stack": (r"dense_layers\.attn\.q_a_proj", r"layers\.attn\.o_proj", r"layers\.moe\.shared\.up_proj"),
    "dense_mlp": (r"dense_layers\.mlp\..*",),
    "mixed": (
        TargetRule(pattern=r"layers\.0\.(attn\.kv_b|mlp\.gate)_proj", rank=2, alpha=3.0),
        TargetRule(pattern=r"layers\.2\.attn\..*", rank=0),
        TargetRule(pattern=r"layers\.moe\.shared\.gate_proj", rank=5),
        ALL_LINEAR,
    ),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**DEEPSEEK)).eval()
    directory = tmp_path_factory.mktemp("deepseek")
    model.save_pretrained(directory)
    return model, load_base(directory)


def theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS, dtype=torch.long)).logits.float().numpy()


def with_adapter(base, cohort, adapter) -> np.ndarray:
    run = jax.jit(lambda params, adapter: base.model(params, TOKENS, adapt=bind(cohort, adapter, {})))
    return np.asarray(run(base.params, adapter))


def saved(base, case, directory):
    """(cohort, adapter) off its start, and its PEFT directory."""
    cohort = Cohort.of(AdapterConfig(rank=4, alpha=8.0, targets=TARGETS[case]), base.model.sites())
    adapter = cohort.init(jax.random.key(0))
    for name, leaves in adapter.items():
        spec = cohort.specs[name]
        keep = (np.arange(spec.rank) < np.asarray(spec.ranks)[:, None])[..., None]
        leaves["b"] = jnp.asarray(0.3 * np.random.default_rng(1).standard_normal(leaves["b"].shape) * keep, jnp.float32)
    return cohort, adapter, save_peft(directory, adapter, config=cohort.config, specs=cohort.specs)


@pytest.mark.parametrize("case", ATTENTION)
def test_an_adapter_means_the_same_in_peft(pair, case, tmp_path):
    model, base = pair
    cohort, adapter, directory = saved(base, case, tmp_path / "adapter")
    ours = with_adapter(base, cohort, adapter)
    assert np.abs(ours - theirs(model)).max() > 0.05
    read = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(directory)).eval()
    adapted = sum(hasattr(module, "lora_A") for module in read.modules())
    assert adapted == sum(rank > 0 for spec in cohort.sites for rank in spec.ranks)
    np.testing.assert_allclose(ours, theirs(read), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", TARGETS)
def test_a_directory_reads_back_as_it_was(pair, case, tmp_path):
    _, base = pair
    cohort, adapter, directory = saved(base, case, tmp_path / "adapter")
    config, back = load_peft(directory, base.model.sites())
    assert {name: (spec.ranks, spec.scales) for name, spec in Cohort.of(config, base.model.sites()).specs.items()} == {
        name: (spec.ranks, spec.scales) for name, spec in cohort.specs.items()
    }
    jax.tree.map(np.testing.assert_array_equal, back, adapter)


def test_adapters_of_routed_experts_are_refused_by_name(pair, tmp_path):
    model, base = pair
    settings = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(model), settings).save_pretrained(tmp_path)
    with pytest.raises(PeftError, match="target_parameters"):
        load_peft(tmp_path, base.model.sites())


@pytest.mark.parametrize(("site", "why"), [("router", "module name"), ("experts.up_proj", "target_parameters")])
def test_an_adapter_on_the_router_or_on_experts_has_no_place_in_peft(pair, site, why, tmp_path):
    _, base = pair
    cohort = Cohort.of(AdapterConfig(rank=2, targets=(rf"layers\.moe\.{site}",)), base.model.sites())
    adapter = cohort.init(jax.random.key(0))
    with pytest.raises(PeftError, match=rf"layers\.moe\.{site}.*{why}"):
        save_peft(tmp_path / "adapter", adapter, config=cohort.config, specs=cohort.specs)
