"""Cross-entropy under a frozen head as losses call it: gradient, vmap, isolation, and what never exists."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.kernels.cross_entropy import reference, token_nll
from popax.kernels.cross_entropy.ops import OPS

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(2, 90))  # M, D, V


def _operands(lora_math, seed, shape, vocab_first):
    rows, embed, vocab = shape
    x = lora_math.normal(seed, (rows, embed))
    w = lora_math.normal(seed + 1, (vocab, embed) if vocab_first else (embed, vocab))
    return x, w, jnp.asarray(np.random.default_rng(seed + 2).integers(0, vocab, rows), jnp.int32)


@given(shape=SHAPES, vocab_first=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=4, deadline=None)
def test_the_gradient_is_that_of_log_softmax(lora_math, shape, vocab_first, seed):
    x, w, target = _operands(lora_math, seed, shape, vocab_first)
    weights = jnp.linspace(-1.0, 2.0, shape[0])

    def dense(x):
        logits = jax.nn.log_softmax(jnp.matmul(x, w.T if vocab_first else w))
        return -jnp.sum(weights * jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0])

    def chunked(x):
        return jnp.sum(weights * token_nll(x, w, target, vocab_first=vocab_first))

    want, got = jax.value_and_grad(dense)(x), jax.value_and_grad(chunked)(x)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(w))))


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = jnp.linspace(-1.0, 1.0, 12, dtype=jnp.float64).reshape(3, 4)
        nats = token_nll(x, x, jnp.arange(3), vocab_first=True)
    assert nats.dtype == jnp.float64


def test_a_target_outside_the_vocabulary_costs_infinitely_much():
    nats = token_nll(jnp.ones((3, 2)), jnp.ones((5, 2)), jnp.asarray([-1, 4, 5]), vocab_first=True)
    np.testing.assert_allclose(nats, [np.inf, np.log(5.0), np.inf], rtol=1e-6)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_leading_axes_are_rows(lora_math, leading):
    x, w = lora_math.normal(0, (*leading, 5), "bfloat16"), lora_math.normal(1, (5, 7), "float32")
    target = jnp.full(leading, 3)
    nats = token_nll(x, w, target, vocab_first=False)
    assert (nats.shape, nats.dtype) == (leading, jnp.float32)
    flat = token_nll(x.reshape(-1, 5), w, target.reshape(-1), vocab_first=False)
    np.testing.assert_array_equal(nats.reshape(-1), flat)


@pytest.mark.parametrize("vocab_first", [True, False])
def test_a_gradient_of_the_head_is_refused_by_name(lora_math, vocab_first):
    x, w, target = _operands(lora_math, 0, (4, 5, 6), vocab_first)
    loss = lambda x, w: jnp.sum(token_nll(x, w, target, vocab_first=vocab_first))  # noqa: E731
    for step in (jax.grad(loss, argnums=1), jax.grad(loss, argnums=(0, 1)), jax.jit(jax.grad(loss, argnums=1))):
        with pytest.raises(NotImplementedError, match="no gradient for the head's weight"):
            step(x, w)
    free = lambda x, w: loss(x, jax.lax.stop_gradient(w))  # noqa: E731
    assert np.any(jax.jit(jax.grad(loss))(x, w))
    assert not np.any(jax.grad(free, argnums=1)(x, w))


def _step(w, vocab_first):
    return jax.vmap(
        jax.value_and_grad(lambda x, target: jnp.sum(token_nll(x, w, target, vocab_first=vocab_first))),
        in_axes=(0, 0),
    )


@pytest.mark.parametrize("vocab_first", [True, False])
def test_vmap_is_a_loop_over_users(lora_math, vocab_first):
    """Invariant 1, for the op: a member of the population == that member alone; nested vmaps too."""
    x, w, target = _operands(lora_math, 3, (24, 8, 30), vocab_first)
    x, target = x.reshape(4, 6, 8), target.reshape(4, 6)
    losses, gradients = _step(w, vocab_first)(x, target)
    alone = jax.value_and_grad(lambda x, target: jnp.sum(token_nll(x, w, target, vocab_first=vocab_first)))
    for user in range(4):
        loss, gradient = alone(x[user], target[user])
        np.testing.assert_allclose(losses[user], loss, rtol=1e-6)
        np.testing.assert_allclose(gradients[user], gradient, rtol=1e-6, atol=1e-6)
    nested = jax.vmap(_step(w, vocab_first))(x.reshape(2, 2, 6, 8), target.reshape(2, 2, 6))
    np.testing.assert_array_equal(nested[0].reshape(4), losses)
    np.testing.assert_array_equal(nested[1].reshape(gradients.shape), gradients)


def test_unbatched_operands_are_everybodys_and_batched_heads_their_own(lora_math):
    x, w, target = _operands(lora_math, 4, (6, 8, 30), True)
    nats = functools.partial(token_nll, vocab_first=True)
    other = (target + 1) % 30
    for user, each in enumerate(jax.vmap(nats, in_axes=(None, None, 0))(x, w, jnp.stack([target, other]))):
        np.testing.assert_allclose(each, nats(x, w, (target, other)[user]), rtol=1e-6)
    heads = jnp.stack([w, -w])
    for user, each in enumerate(jax.vmap(nats, in_axes=(None, 0, None))(x, heads, target)):
        np.testing.assert_allclose(each, nats(x, heads[user], target), rtol=1e-6)


def test_users_do_not_meet(lora_math):
    """Invariant 2: a NaN in one user's rows leaves the others' bytes; nobody's loss has a gradient at another's."""
    x, w, target = _operands(lora_math, 5, (24, 8, 30), True)
    x, target = x.reshape(4, 6, 8), target.reshape(4, 6)
    clean, poisoned = _step(w, True)(x, target), _step(w, True)(x.at[1].set(jnp.nan), target)
    for before, after in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(np.asarray(before)[[0, 2, 3]], np.asarray(after)[[0, 2, 3]])
        assert np.isnan(np.asarray(after)[1]).all()
    crossed = jax.grad(lambda x: jnp.sum(jax.vmap(lambda x, t: token_nll(x, w, t, vocab_first=True))(x, target)[1]))
    assert not np.any(np.asarray(crossed(x))[[0, 2, 3]])


def _avals(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (each.aval for each in (*eqn.invars, *eqn.outvars))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _avals(inner)


@pytest.mark.parametrize("vocab_first", [True, False])
def test_the_logits_never_exist(vocab_first):
    """8 users of 4,096 rows: 33 times the largest chunk. Neither they, nor a head for each user."""
    users, rows, embed, vocab = 8, 4096, 16, 1 << 17
    w = jax.ShapeDtypeStruct((vocab, embed) if vocab_first else (embed, vocab), jnp.float32)
    x, target = (jax.ShapeDtypeStruct((users, rows, *more), kind) for more, kind in (((embed,), "float32"), ((), int)))
    jaxpr = jax.make_jaxpr(lambda x, w, target: _step(w, vocab_first)(x, target))(x, w, target).jaxpr
    sizes = [aval.size for aval in _avals(jaxpr) if hasattr(aval, "size")]
    assert max(sizes) <= reference.MOST_LOGITS < users * rows * vocab
    assert users * vocab * embed not in sizes


def test_temporaries_are_a_chunk_of_logits():
    """What the compiler holds for Qwen3-0.6B's vocabulary at 32,768 rows, where all logits were 20 GB."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32768, 64), (151936, 64)))
    call = jax.jit(functools.partial(reference.nats_and_gradient, vocab_first=True))
    memory = call.lower(x, w, jax.ShapeDtypeStruct((32768,), jnp.int32)).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 3 * 4 * reference.MOST_LOGITS < 4 * 32768 * 151936 / 10


@given(rows=st.integers(1, 5000), vocab=st.integers(1, 5000), most=st.integers(1, 1 << 16))
def test_chunks_are_small_enough_and_few(rows, vocab, most):
    count = reference.chunks(rows, vocab, most)
    most_rows = max(most // vocab, 1)
    assert 1 <= -(-rows // count) <= most_rows
    assert count < 2 * -(-rows // most_rows)


def test_spread_users_need_no_collective(lora_math):
    """Over a population axis of 4 devices, in several chunks: the same numbers, and no collective (invariant 10)."""
    mesh = jax.make_mesh((4,), ("population",))
    x, w, target = _operands(lora_math, 8, (64, 8, 40), True)
    call = jax.jit(functools.partial(reference.nats_and_gradient, vocab_first=True, most_logits=640))
    by_user = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("population"))
    sharded = (
        jax.device_put(x, by_user),
        jax.device_put(w, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())),
        jax.device_put(target, by_user),
    )
    assert reference.chunks(64, 40, 640) == 4
    hlo = call.lower(*sharded).compile().as_text()
    assert not any(word in hlo for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))
    for got, want in zip(call(*sharded), call(x, w, target), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_chunks_do_not_grow_with_the_replicas(lora_math):
    """A chunk may gather the head: twice the users on twice the replicas are as many chunks, of the same numbers."""
    x, w, target = _operands(lora_math, 8, (64, 8, 40), True)
    nats = functools.partial(reference.nats, vocab_first=True, most_logits=320)

    def lengths(rows):
        scans = jax.make_jaxpr(nats)(x[:rows], w, target[:rows]).eqns
        return [each.params["length"] for each in scans if each.primitive.name == "scan"]

    assert (lengths(32), lengths(64)) == ([4], [8])
    for replicas, rows in ((2, 32), (4, 64)):
        with jax.set_mesh(jax.make_mesh((replicas, 2), ("population", "fsdp"), devices=jax.devices()[: 2 * replicas])):
            assert lengths(rows) == [2]
            by_chunks = nats(x, w, target)[0]
        np.testing.assert_allclose(by_chunks, nats(x, w, target)[0], rtol=1e-6)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_tables_rows_agree(op):
    """Every named shape is one the op takes; the rivals are the same function."""
    for spec in op.specs:
        outputs = jax.eval_shape(op.implementations["xla"], *op.operands(spec, jnp.bfloat16))
        rival = jax.eval_shape(op.rivals["whole_logits"], *op.operands(spec, jnp.bfloat16))
        assert [(each.shape, each.dtype) for each in outputs] == [(each.shape, each.dtype) for each in rival]
    small = op.specs[0]._replace(rows=8, vocab=40)
    example = [jnp.asarray(each) for each in op.example(small, np.float32, 0)]
    want = op.rivals["whole_logits"](*example)
    for form in (op.implementations["xla"], functools.partial(op.rivals["xla_unrolled"], most_logits=80)):
        for got, true in zip(form(*example), want, strict=True):
            np.testing.assert_allclose(got, true, rtol=1e-4, atol=1e-5)
