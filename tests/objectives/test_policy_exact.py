"""The replayed policy gradient against transformers: one sampled token, all of them enumerated, routes frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind
from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.data.rollouts import RolloutRecord, pack_rollouts
from popax.modeling.base import Base, load_base
from popax.objectives.base import mean_of
from popax.objectives.policy_gradient import policy_gradient

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity
V, E, K, LAYERS = 24, 8, 2, 2
PROMPT = [3, 11, 7, 19]
SITES = {"layers.attn.q_proj": "self_attn.q_proj", "layers.moe.router": "mlp.gate"}
SHAPE = {
    **{"vocab_size": V, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": LAYERS, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2},
    **{"num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": 16, "norm_topk_prob": True},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SHAPE, tie_word_embeddings=False, experts_implementation="eager")
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    directory = tmp_path_factory.mktemp("qwen3_moe")
    model.save_pretrained(directory)
    return model, load_base(directory)


@pytest.fixture(scope="module")
def routes_TxLxK() -> np.ndarray:
    """Experts that serving took and the routers of training would not."""
    rng = np.random.default_rng(5)
    return rng.permuted(np.tile(np.arange(E), (len(PROMPT), LAYERS, 1)), axis=-1)[..., :K].astype(np.int16)


REWARD_V = np.random.default_rng(6).normal(size=V)


def frozen_logits(model, routes_TxLxK, monkeypatch):
    """The prompt's logits [T, V] in float64, with the recorded experts where a router would take its best."""
    layers = iter(range(LAYERS))

    def recorded(values, count, dim):
        assert (count, dim) == (K, -1)
        index = torch.asarray(routes_TxLxK[:, next(layers)].astype(np.int64))
        return values.gather(-1, index), index

    with monkeypatch.context() as patched:
        patched.setattr(torch, "topk", recorded)
        logits_TxV = model.double()(torch.asarray([PROMPT])).logits[0]
    assert next(layers, None) is None, "a router did not ask for its experts"
    return logits_TxV


def expected_reward_gradient(model, routes_TxLxK, monkeypatch) -> dict[str, np.ndarray]:
    """d/dW of sum_a pi(a | prompt) R(a), at each site: [L, d_in, d_out]."""
    model.zero_grad()
    logits_V = frozen_logits(model, routes_TxLxK, monkeypatch)[-1]
    (torch.softmax(logits_V, dim=-1) @ torch.asarray(REWARD_V)).backward()
    modules = {site: [layer.get_submodule(name) for layer in model.model.layers] for site, name in SITES.items()}
    return {site: np.stack([each.weight.grad.T.numpy() for each in found]) for site, found in modules.items()}


def every_action(base: Base, routes_TxLxK):
    """All tokens as continuations, sampled by a uniform policy, with their rewards as advantages."""
    records = [
        RolloutRecord(
            tokens_T=np.asarray([*PROMPT, action], np.int32),
            prompt_length=len(PROMPT),
            logps_T=np.asarray([np.nan] * len(PROMPT) + [-np.log(V)], np.float32),
            routes_TxLxK=np.concatenate([routes_TxLxK, routes_TxLxK[:1]]),  # the action itself is no input
            num_experts=E,
        )
        for action in range(V)
    ]
    texts = [record.rollout(reward) for record, reward in zip(records, REWARD_V, strict=True)]
    return pack_rollouts(base.model, texts, 3 * len(PROMPT))


def adapter_gradients(base: Base, rollouts, **options):
    """(adapter, its gradient): LoRA on the query projection and on the router, fresh, so that W' = W."""
    cohort = Cohort.of(AdapterConfig(rank=3, alpha=3.0, targets=tuple(SITES)), base.model.sites())
    adapter, objective = cohort.init(jax.random.key(2)), mean_of(policy_gradient(base.model, **options))

    def loss(adapter):
        return objective(base.params, bind(cohort, adapter, {}), rollouts)[0]

    return adapter, jax.jit(jax.grad(loss))(adapter)


def test_replayed_policy_gradient_is_the_gradient_of_the_expected_reward(pair, routes_TxLxK, monkeypatch):
    """Under a uniform serving policy the mean over all actions of r(a) R(a) grad log pi(a) is exactly
    sum_a pi(a) R(a) grad log pi(a) = grad sum_a pi(a) R(a), with the selection frozen and the scores live."""
    model, base = pair
    exact = expected_reward_gradient(model, routes_TxLxK, monkeypatch)
    rollouts = every_action(base, routes_TxLxK)
    assert np.max(rollouts.batch.segments_BxT) == 3, "nothing was packed"
    adapter, replayed = adapter_gradients(base, rollouts)
    _, live = adapter_gradients(base, rollouts, replay=False)
    for site, dweight_LxDxF in exact.items():
        # W' = W + (alpha / rank) a^T b with b = 0, so that dJ/db = (alpha / rank) a dJ/dW; alpha = rank here.
        wanted_LxRxF = np.einsum("lrd,ldf->lrf", np.asarray(adapter[site]["a"], np.float64), dweight_LxDxF)
        scale = np.abs(wanted_LxRxF).max()
        assert scale > 1e-3
        np.testing.assert_allclose(-np.asarray(replayed[site]["b"]), wanted_LxRxF, rtol=0, atol=1e-4 * scale)
        assert np.abs(-np.asarray(live[site]["b"]) - wanted_LxRxF).max() > 0.1 * scale, "routes made no difference"


def test_logits_of_frozen_selection_equal_transformers(pair, routes_TxLxK, monkeypatch):
    model, base = pair
    wanted_TxV = frozen_logits(model, routes_TxLxK, monkeypatch).detach().numpy()
    found = jax.jit(base.model)(base.params, jnp.asarray([PROMPT], jnp.int32), routes_BxTxLxK=routes_TxLxK[None])
    np.testing.assert_allclose(found[0], wanted_TxV, rtol=0, atol=1e-4)
    assert np.abs(jax.jit(base.model)(base.params, jnp.asarray([PROMPT], jnp.int32))[0] - wanted_TxV).max() > 0.1
