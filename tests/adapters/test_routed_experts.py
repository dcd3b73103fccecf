"""Adapters on routed experts against a loop in torch: each token, each of its experts, that expert's merged weight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from popax.adapters.apply import bind, bind_slots
from popax.adapters.base import ALL_LINEAR, AdapterConfig, TargetRule
from popax.adapters.cohort import Cohort
from popax.adapters.table import METHODS
from popax.errors import ConfigError, PeftError
from popax.modeling import experts
from popax.modeling.block_config import MoEConfig
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.modeling.moe import MoE
from popax.sharding import DEFAULT_RULES, ShardingRules
from popax.store import Catalog, RowLayout
from popax.store.checkpoint import CheckpointStore
from popax.store.extract import extract_to_peft, extract_user
from popax.types import NO_ADAPT, SiteInfo

torch = pytest.importorskip("torch")

N, B, T, D, F, K, E = 4, 2, 9, 8, 16, 3, 8
NAME = "layers.moe.experts"
SITES = {
    f"{NAME}.{part}_proj": SiteInfo(
        name=f"{NAME}.{part}_proj",
        **{"d_in": F, "d_out": D, "axes": ("expert_ffw", "embed"), "hidden_side": "out"}
        if part == "down"
        else {"d_in": D, "d_out": F, "axes": ("embed", "expert_ffw"), "hidden_side": "in"},
        layers=1,
        experts=E,
    )
    for part in ("gate", "up", "down")
}
TARGETS = {
    "all": (TargetRule(pattern=r".*\.up_proj", rank=3, alpha=5.0), r".*experts\..*_proj"),
    "gate": (r".*experts\.gate_proj",),
    "down": (r".*experts\.down_proj",),
}
MESHES = (
    {"population": 2, "expert": 2, "tensor": 2},
    {"expert": 2, "fsdp": 2, "population": 2},
    {"fsdp": 8},  # more than there are users: every device has all users' factors
)
MODEL = Model(
    ModelConfig(
        **{"vocab_size": 32, "embed_dim": 16, "ffw_dim": 24, "num_layers": 3, "num_heads": 2, "num_kv_heads": 2},
        **{"head_dim": 8, "max_seq_len": 32},
        moe=MoEConfig(num_experts=4, experts_per_token=2, expert_ffw_dim=8, shared_ffw_dim=8, first_dense_layers=1),
    )
)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def layer():
    moe = MoEConfig(num_experts=E, experts_per_token=K, expert_ffw_dim=F)
    config = dataclasses.replace(MODEL.config, embed_dim=D, moe=moe)
    return nnx.split(MoE(NAME.removesuffix(".experts"), config, moe, rngs=nnx.Rngs(params=0), shrink=1.0).experts)


def cohort_of(targets: str, **settings) -> Cohort:
    return Cohort.of(AdapterConfig(rank=2, alpha=3.0, targets=TARGETS[targets], **settings), SITES)


def users_of(cohort: Cohort):
    """N users' adapters with the layer axis [N, 1, ...], away from their start."""
    keys = iter(jax.random.split(jax.random.key(3), 20))
    return jax.tree.map(lambda leaf: 0.2 * jax.random.normal(next(keys), (N, *leaf.shape)), cohort.abstract())


def tokens_of(length: int = T):
    """(x, experts of each token, weights of the sum) of N users; experts 0 and E - 1 are nobody's."""
    rng = np.random.default_rng(0)
    expert = np.stack([1 + rng.permutation(E - 2)[:K] for _ in range(N * B * length)]).reshape(N, B * length, K)
    x, weight = rng.normal(size=(N, B, length, D)), rng.random((N, B * length, K)) / K
    return jnp.asarray(x, jnp.float32), jnp.asarray(expert, jnp.int32), jnp.asarray(weight, jnp.float32)


def first_layer(site_fns):
    return jax.tree.map(lambda leaf: leaf[0], site_fns)


def run_experts(layer, x, expert, weight, site_fn):
    return nnx.merge(*layer)(x, expert, weight, site_fn, ShardingRules())


def output(layer, cohort, adapter, x, expert, weight, **slots):
    adapt = bind_slots(cohort, adapter, {}, **slots) if slots else bind(cohort, adapter, {})
    return run_experts(layer, x, expert, weight, first_layer(adapt.layers))


def loss_and_gradients(layer, cohort):
    """For N users: (loss, y) and the gradients of the adapter, of x and of the weights of the sum."""

    def loss(adapter, x, weight, expert):
        y = output(layer, cohort, adapter, x, expert, weight)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.vmap(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)))


def one_by_one(layer, cohort, adapter, x, expert, weight):
    """The same for one user, in float64: every weight merged, every token and each of its experts by itself."""
    tensor = lambda leaf: torch.tensor(np.asarray(leaf), dtype=torch.float64)  # noqa: E731
    base = {name: tensor(part["kernel"][...]) for name, part in nnx.to_pure_dict(layer[1]).items()}
    own = {
        site: {leaf: tensor(value[0]).requires_grad_() for leaf, value in leaves.items()}
        for site, leaves in adapter.items()
    }
    x, weight, merged = tensor(x).requires_grad_(), tensor(weight).requires_grad_(), {}
    for part, w in base.items():
        leaves, spec = own.get(f"{NAME}.{part}"), cohort.specs.get(f"{NAME}.{part}")
        for e in range(E):
            merged[part, e] = w[e]
            if leaves is not None:
                a, b = (leaf[e] if leaf.ndim == 3 else leaf for leaf in (leaves["a"], leaves["b"]))
                merged[part, e] = w[e] + spec.scales[0] * a.T @ b
    rows = []
    for m, row in enumerate(x.reshape(-1, D)):
        total = torch.zeros(D, dtype=torch.float64)
        for k in range(K):
            e = int(expert[m, k])
            hidden = torch.nn.functional.silu(row @ merged["gate_proj", e]) * (row @ merged["up_proj", e])
            total = total + weight[m, k] * (hidden @ merged["down_proj", e])
        rows.append(total)
    y = torch.stack(rows).reshape(x.shape)
    torch.sin(y).sum().backward()
    grad = lambda leaf: leaf.grad.numpy()  # noqa: E731
    return y.detach().numpy(), (jax.tree.map(lambda leaf: grad(leaf)[None], own), grad(x), grad(weight))


def close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), found, wanted)


@pytest.fixture(scope="module")
def alone(layer):
    """targets -> what each user alone gets, in torch."""

    @functools.cache
    def of(targets: str):
        operands = users_of(cohort_of(targets)), *tokens_of()
        one = lambda user: jax.tree.map(lambda leaf: leaf[user], operands)  # noqa: E731
        return [one_by_one(layer, cohort_of(targets), *one(user)) for user in range(N)]

    return of


def check(layer, targets, wanted):
    cohort, (x, expert, weight) = cohort_of(targets), tokens_of()
    (_, y), gradients = loss_and_gradients(layer, cohort)(users_of(cohort), x, weight, expert)
    for user, (own_y, own_gradients) in enumerate(wanted):
        close(y[user], own_y)
        close(jax.tree.map(lambda leaf: leaf[user], gradients), own_gradients)  # noqa: B023


@pytest.mark.parametrize(("targets", "chunk"), [("all", 4096), ("all", 5), ("gate", 16), ("down", 16)])
def test_a_population_is_the_loop_over_tokens_and_experts(layer, alone, targets, chunk, monkeypatch):
    """chunk 5 has fewer rows than groups, so that factors are gathered; with 16 a user's tokens are in several."""
    monkeypatch.setattr(experts, "CHUNK_TOKENS", chunk)
    check(layer, targets, alone(targets))


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_experts_and_users_on_a_mesh_are_the_same(layer, alone, axes):
    with jax.set_mesh(Mesh(np.array(jax.devices()).reshape(*axes.values()), tuple(axes))):
        check(layer, "all", alone("all"))


def test_rows_of_mixed_users_are_each_user_alone_and_the_bases_rows_its_own_bits(layer):
    """Invariant 5, where rows are grouped (9 tokens a row) and where factors are gathered (1)."""
    cohort = cohort_of("all")
    users, slot_B = users_of(cohort), jnp.asarray([2, -1, 0, 2, 1, -1, 3, 0], jnp.int32)
    pool = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), users)
    run = jax.jit(functools.partial(output, layer, cohort))
    for length in (9, 1):
        x, expert, weight = (leaf.reshape(N * B, -1, leaf.shape[-1]) for leaf in tokens_of(length))
        flat = (x, expert.reshape(-1, K), weight.reshape(-1, K))
        mixed = run(pool, *flat, slot_B=slot_B)
        base = jax.jit(lambda flat: run_experts(layer, *flat, NO_ADAPT))(flat)
        for row, slot in enumerate(slot_B.tolist()):
            if slot < 0:
                np.testing.assert_array_equal(mixed[row], base[row])
            else:
                own = jax.tree.map(lambda leaf: leaf[slot], users)  # noqa: B023
                close(mixed[row], run(own, x[row][None], expert[row], weight[row])[0])
                assert np.abs(mixed[row] - base[row]).max() > 1e-3


def test_tokens_of_one_row_have_slots_of_their_own(layer):
    cohort = cohort_of("all")
    pool = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), users_of(cohort))
    x, expert, weight = (leaf.reshape(N * B, T, leaf.shape[-1]) for leaf in tokens_of())
    flat = (x, expert.reshape(-1, K), weight.reshape(-1, K))
    run = jax.jit(functools.partial(output, layer, cohort))
    slots = jnp.asarray(np.random.default_rng(3).integers(-1, N, (N * B, T)), jnp.int32)
    together = run(pool, *flat, slot_B=slots)
    for slot in range(-1, N):
        whole = run(pool, *flat, slot_B=jnp.full(N * B, slot, jnp.int32))
        close(together[slots == slot], whole[slots == slot])


def test_a_row_that_is_not_finite_leaves_the_gradients_of_other_slots(layer):
    cohort, slot_B = cohort_of("all"), jnp.asarray([0, 1, -1, 1], jnp.int32)
    pool = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), users_of(cohort))
    x, expert, weight = (leaf.reshape(4, -1, leaf.shape[-1]) for leaf in tokens_of())
    flat = (expert.reshape(-1, K), weight.reshape(-1, K))

    def gradient(x):
        return jax.grad(lambda pool: jnp.sum(jnp.sin(output(layer, cohort, pool, x, *flat, slot_B=slot_B))))(pool)

    bad = jax.jit(gradient)(x.at[0].set(jnp.nan).at[2].set(jnp.nan))
    for leaf, good in zip(jax.tree.leaves(bad), jax.tree.leaves(jax.jit(gradient)(x)), strict=True):
        np.testing.assert_allclose(leaf[:, 1], good[:, 1], **CLOSE)
        assert np.isnan(leaf[:, 0]).any()
        assert not np.asarray(leaf[:, 2:]).any()  # slots without a row


def test_one_adapter_for_the_batches_of_many_users_is_not_copied_for_them(layer):
    """As where one user's adapter is tried on others' text: values, and each user's own gradient."""
    cohort, tokens = cohort_of("all"), tokens_of()
    one = jax.tree.map(lambda leaf: leaf[0], users_of(cohort))
    same = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (N, *leaf.shape)), one)
    run = lambda adapter, *own: output(layer, cohort, adapter, *own)  # noqa: E731
    both = [jax.jit(jax.vmap(run, in_axes=(axis, 0, 0, 0))) for axis in (None, 0)]
    close(both[0](one, *tokens), both[1](same, *tokens))
    assert f"tensor<{N}x{E}x2x{F}xf32>" not in both[0].lower(one, *tokens).as_text()
    gradient = jax.grad(lambda *operands: jnp.sum(jnp.sin(run(*operands))))
    found, wanted = (jax.vmap(gradient, in_axes=(axis, 0, 0, 0)) for axis in (None, 0))
    close(jax.jit(found)(one, *tokens), jax.jit(wanted)(same, *tokens))


def test_what_a_user_has_at_experts():
    cohort = cohort_of("all")
    shapes = jax.tree.map(lambda leaf: leaf.shape, cohort.abstract())
    assert shapes[f"{NAME}.gate_proj"] == {"a": (1, 2, D), "b": (1, E, 2, F)}
    assert shapes[f"{NAME}.down_proj"] == {"a": (1, E, 2, F), "b": (1, 2, D)}
    assert cohort.num_params == (2 + 2 + 3) * (D + E * F)
    axes = cohort.axes()
    assert axes[f"{NAME}.up_proj"] == {
        "a": ("layers", "rank", "embed"),
        "b": ("layers", "expert", "rank", "expert_ffw"),
    }
    assert axes[f"{NAME}.down_proj"]["a"] == ("layers", "expert", "rank", "expert_ffw")
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("population", "expert"))
    rules = ShardingRules(rules=(("population", ("population", "expert")), *DEFAULT_RULES[1:]))
    spec = rules.spec(("population", *axes[f"{NAME}.up_proj"]["b"]), mesh)
    assert spec == PartitionSpec("population", None, "expert", None, None)  # users may be spread over experts' devices


def test_merging_and_norms_are_of_every_expert(layer):
    cohort = cohort_of("all")
    one = jax.tree.map(lambda leaf: leaf[0], users_of(cohort))
    norms = cohort.norms(one, {})
    for site, spec in cohort.specs.items():
        w = jax.random.normal(jax.random.key(1), (1, E, spec.info.d_in, spec.info.d_out))
        a, b = (np.asarray(leaf, np.float64) for leaf in (one[site]["a"][0], one[site]["b"][0]))
        delta = np.stack([(a[e] if a.ndim == 3 else a).T @ (b[e] if b.ndim == 3 else b) for e in range(E)])
        close(cohort.merge(site, w, one, {})[0][0], w[0] + spec.scales[0] * delta)
        close(norms[site][0], spec.scales[0] * np.sqrt((delta**2).sum()))


def test_what_has_no_form_at_experts_is_refused_by_name():
    for method in (name for name, row in METHODS.items() if row.experts is None and row.kind == "linear"):
        with pytest.raises(ConfigError, match=rf"{method}.*experts\.gate_proj.*lora"):
            cohort_of("gate", method=method)
    with pytest.raises(ConfigError, match=r"dropout=0\.1 at .*experts\.down_proj"):
        cohort_of("all", dropout=0.1)


def test_dropout_is_on_what_enters_the_adapter(layer):
    cohort, (x, expert, weight) = cohort_of("gate", dropout=0.5), tokens_of()
    one = jax.tree.map(lambda leaf: leaf[0], users_of(cohort))
    first = lambda key: first_layer(bind(cohort, one, {}, dropout_key=key).layers)  # noqa: E731
    run = lambda key: run_experts(layer, x[0], expert[0], weight[0], first(key))  # noqa: E731
    assert np.abs(run(jax.random.key(0)) - run(None)).max() > 1e-3
    np.testing.assert_array_equal(run(jax.random.key(0)), run(jax.random.key(0)))


def test_a_merged_model_has_the_adapted_models_logits():
    """Invariant 4, on a model whose mixtures begin after a dense layer, with a rank of its own in one layer."""
    targets = (TargetRule(pattern=r"layers\.2\.moe\.experts\.up_proj", rank=1), ALL_LINEAR, r"layers\.moe\.experts\..*")
    cohort = Cohort.of(AdapterConfig(rank=2, alpha=3.0, targets=targets), MODEL.sites())
    params, tokens = MODEL.init(jax.random.key(0)), jnp.arange(14, dtype=jnp.int32).reshape(2, 7)
    adapter = jax.jit(cohort.init)(jax.random.key(1))
    forward = jax.jit(lambda params, adapt: MODEL(params, tokens, adapt=adapt))
    base = forward(params, NO_ADAPT)
    np.testing.assert_array_equal(forward(params, bind(cohort, adapter, {})), base)  # a fresh adapter is the base
    up = adapter["layers.moe.experts.up_proj"]["a"]
    assert np.asarray(up[1, 0]).any()
    assert not np.asarray(up[1, 1]).any()  # layer 2 of the model has rank 1
    adapter = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.where(leaf == 0, 1.0, 0.0), adapter)
    adapter["layers.moe.experts.up_proj"] = jax.tree.map(
        lambda leaf: leaf.at[1, ..., 1, :].set(0.0), adapter["layers.moe.experts.up_proj"]
    )
    adapted, merged = forward(params, bind(cohort, adapter, {})), params
    for site in cohort.specs:
        weight, _ = cohort.merge(site, MODEL.site_weight(params, site), adapter, {})
        merged = MODEL.with_site_weight(merged, site, weight)
    np.testing.assert_allclose(adapted, forward(merged, NO_ADAPT), rtol=1e-4, atol=1e-4)
    assert np.abs(adapted - base).max() > 0.01


def test_experts_are_kept_and_taken_out_bit_for_bit(tmp_path):
    """Committed to a catalog, checkpointed with a population, and extracted from both."""
    cohort = Cohort.of(AdapterConfig(rank=2, targets=(r".*experts.*",)), MODEL.sites())
    users = [jax.tree.map(np.asarray, jax.jit(cohort.init)(jax.random.key(seed))) for seed in range(2)]
    catalog = Catalog.open(tmp_path / "catalog", create=True)
    stored = catalog.cohort(cohort.config, cohort.specs, "base", RowLayout.of(users[0]))
    for name, adapter in zip(("ada", "bob"), users, strict=True):
        catalog.commit(stored, name, adapter)
    store = CheckpointStore(tmp_path / "run", cohort=stored)
    together = jax.tree.map(lambda *leaves: np.stack(leaves), *users)
    store.save(1, adapters=together, train_state={}, record={}, users=["ada", "bob"])
    store.close()
    for source in ("catalog", "run"):
        found = extract_user(tmp_path / source, "bob")
        assert Cohort(found.config, tuple(found.specs.values())) == cohort
        jax.tree.map(np.testing.assert_array_equal, found.adapter, users[1])
    with pytest.raises(PeftError, match="target_parameters"):
        extract_to_peft(tmp_path / "catalog", "bob", tmp_path / "peft")
