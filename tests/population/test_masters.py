"""Adapters that are stored in few bits learn as those of float32 do, and nothing that is not finite is accepted."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from popax.objectives.base import LossSums
from popax.objectives.sft import sft
from popax.population.optimizer import adamw, constant, sgd, warmup_cosine
from popax.population.state import hparams, init_population
from popax.population.step import member_step, population_loss, population_step
from popax.trees import member

DTYPES = ("float16", "bfloat16", "float32")


@pytest.fixture(autouse=True)
def _as_commands_run():
    with jax.numpy_dtype_promotion("standard"):
        yield


def population(bench, dtype, *, users=1, optimizer=None, method="lora", **settings):
    targets = (r"layers\.0\..*q_proj", r"layers\..*down_proj")  # a part of a layer, and both
    cohort = bench.cohort(method, dtype=dtype, targets=targets)
    own = hparams(**{"learning_rate": 1e-4, "max_steps": 5_000, **settings})
    keys = jax.random.split(jax.random.key(1), users)
    return cohort, init_population(cohort, optimizer or adamw(), keys, own, track_best=True)


def linear(gradient):
    """An objective whose gradient is this number, a step, in every leaf of the layers' adapter."""

    def objective(base, adapt, batch, hparams):
        leaves = jax.tree.leaves(adapt.layers.state)
        loss = gradient * sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves)
        zero = jnp.zeros(())
        return loss, jnp.ones(()), LossSums(zero, zero, zero)

    return objective


def norms(tree):
    return [float(jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32))))) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_steps_add_up_whatever_is_stored(bench, random_batch, dtype):
    """400 steps at a rate of 1e-4: the loss falls within 2% as far as with float32 adapters, and no step is skipped."""

    @functools.cache
    def progress(dtype):
        cohort, state = population(bench, dtype)
        step = population_step(cohort, sft(bench.model), adamw(), constant())
        batch = random_batch(1)

        def one(state, _):
            state, metrics = step(bench.params, {}, state, batch)
            return state, metrics.loss[0]

        state, losses = jax.jit(lambda state: jax.lax.scan(one, state, length=400))(state)
        return float(losses[0] - losses[-1]), int(state.skipped[0])

    (wide, _), (narrow, skipped) = progress("float32"), progress(dtype)
    assert skipped == 0
    assert wide > 0.01
    assert abs(narrow - wide) < 0.02 * wide, f"{dtype}: the loss fell by {narrow}, with float32 by {wide}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_moment_decays(bench, random_batch, dtype):
    """1e-3 after 2,000 gradients of 1e-9: 1e-3 * 0.999^2000 = 1.35e-4."""
    cohort, state = population(bench, dtype)
    step = member_step(cohort, linear(1e-9), adamw(), constant())
    one = member(state, 0)
    moments = one.opt_state[0]
    moments = moments._replace(nu=jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), moments.nu))
    one = one._replace(opt_state=(moments, *one.opt_state[1:]))
    batch = member(random_batch(1), 0)
    run = jax.jit(
        lambda one: jax.lax.scan(lambda one, _: (step(bench.params, {}, one, batch)[0], None), one, length=2_000)[0]
    )
    after = run(one)
    for leaf in jax.tree.leaves(after.opt_state[0].nu):
        np.testing.assert_allclose(np.asarray(leaf, np.float64), 1e-3 * 0.999**2000, rtol=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_sees_what_will_be_stored(bench, random_batch, dtype):
    """The loss of masters is the loss of the same adapter after it was stored, to the last bit but the sums' order."""
    cohort, state = population(bench, dtype)
    key = jax.random.key(3)
    noise = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape) * 0.3 + 1e-6, state.adapters)
    stored = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).astype(getattr(ml_dtypes, dtype, dtype))), noise)
    loss = jax.jit(population_loss(cohort, sft(bench.model)))
    masters, again = (loss(bench.params, {}, each, random_batch(1)) for each in (noise, stored))
    np.testing.assert_allclose(masters.nll, again.nll, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_the_dtypes_own(dtype):
    from popax.adapters.masters import rounded

    rng = np.random.default_rng(0)
    x = rng.standard_normal(20_000) * 10.0 ** rng.uniform(-12, 6, 20_000)
    x = np.float32([*x, 0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 2.0**-14, 2.0**-25, 3 * 2.0**-25])
    with np.errstate(over="ignore"):
        want = x.astype(getattr(ml_dtypes, dtype, dtype)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(lambda x: rounded(x, dtype))(x), want)
    assert float(jax.grad(lambda x: 3 * rounded(x, dtype))(jnp.float32(1e-9))) == 3.0


@pytest.mark.parametrize(
    ("dtype", "gradient", "optimizer", "settings"),
    [
        ("float32", 1e15, sgd(), {"learning_rate": 1e30}),  # the update overflows, the gradient does not
        ("float32", 0.0, adamw(eps=0.0), {}),  # 0 / 0
        ("float16", 1.0, sgd(), {"learning_rate": 1e5}),  # the adapter does, once it is stored
    ],
)
def test_invariant_11_an_update_that_is_not_finite_is_not_accepted(
    bench, random_batch, dtype, gradient, optimizer, settings
):
    cohort, state = population(bench, dtype, optimizer=optimizer, **settings)
    step = jax.jit(population_step(cohort, linear(gradient), optimizer, constant()))
    after, metrics = step(bench.params, {}, state, random_batch(1))
    assert np.isfinite(np.asarray(metrics.loss)).all()
    for before, now in zip(
        jax.tree.leaves((state.adapters, state.opt_state)), jax.tree.leaves((after.adapters, after.opt_state))
    ):
        np.testing.assert_array_equal(before, now)
    assert int(after.skipped[0]) == 1
    assert not bool(metrics.ran[0])


def test_an_optimizer_may_keep_an_infinity_of_its_own(bench, random_batch):
    """A best value so far, say: only what breaks in a step is refused."""
    import optax

    def patient(own):
        start = lambda params: {"best": jnp.float32(jnp.inf)}  # noqa: E731
        return optax.chain(
            optax.GradientTransformation(start, lambda u, s, p=None: (u, s)), optax.sgd(own.learning_rate)
        )

    cohort, state = population(bench, "float32", optimizer=patient)
    step = jax.jit(population_step(cohort, sft(bench.model), patient, constant()))
    _, metrics = step(bench.params, {}, state, random_batch(1))
    assert bool(metrics.ran[0])


def test_invariants_1_and_11_members_of_one_to_three_steps(bench, random_batch):
    """Each of their steps teaches them something, and they are as if alone."""
    cohort, state = population(bench, "float32", users=3, learning_rate=3e-3)
    state = state._replace(hparams=state.hparams._replace(max_steps=jnp.asarray([1, 2, 3], jnp.int32)))
    arguments = (cohort, sft(bench.model), adamw(eps=1e-6), warmup_cosine())
    together, alone = jax.jit(population_step(*arguments)), jax.jit(member_step(*arguments))
    single = [member(state, user) for user in range(3)]
    for at in range(3):
        batch, before = random_batch(3, seed=at), state
        state, metrics = together(bench.params, {}, state, batch)
        for user in range(3):
            if at <= user:
                moved = norms(jax.tree.map(lambda a, b, u=user: a[u] - b[u], state.adapters, before.adapters))
                assert max(moved) > 1e-5, f"step {at} of a user of {user + 1} taught them nothing"
                assert float(metrics.learning_rate[user]) > 0
            single[user], _ = alone(bench.params, {}, single[user], member(batch, user))
    for user in range(3):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
            member(state, user).adapters,
            single[user].adapters,
        )
        assert int(state.step[user]) == user + 1
        assert max(norms({site: leaves["b"] for site, leaves in member(state, user).adapters.items()})) > 0


def test_what_a_method_derives_is_of_the_numbers_that_are_stored(bench, random_batch):
    """DoRA's sizes of the columns: those of W + s A^T B with the factors as they are stored."""
    cohort, state = population(bench, "bfloat16", method="dora", learning_rate=1e-2)
    shared = bench.shared(cohort)
    step = jax.jit(population_step(cohort, sft(bench.model), adamw(), constant(), weight=bench.model.site_weight))
    for at in range(3):
        state, _ = step(bench.params, shared, state, random_batch(1, seed=at))
    seen = jax.tree.map(lambda leaf: leaf[0].astype(jnp.bfloat16).astype(jnp.float32), state.adapters)
    want = cohort.refreshed(seen, shared, functools.partial(bench.model.site_weight, bench.params))
    for site, leaves in want.items():
        np.testing.assert_allclose(state.adapters[site]["n"][0], leaves["n"], rtol=1e-4, atol=1e-7)
