"""delta-mem: what is written is recalled, the state stays bounded, and a text is read as the formula says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind, bind_slots
from popax.adapters.base import AdapterConfig, TargetRule
from popax.adapters.chain import chain
from popax.adapters.cohort import Cohort
from popax.adapters.delta_mem import METHOD, SHIFT, unit, within, write
from popax.errors import ConfigError
from popax.modeling.cache import init_cache
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.serving.remember import read_text
from tests.modeling.conftest import CONFIGS

RANK, DIM = 4, 12
ONES = jnp.ones((1, RANK))


def units(count, rank=RANK, seed=0):
    return unit(jnp.asarray(np.random.default_rng(seed).standard_normal((count, 1, rank)), jnp.float32))


def test_what_was_written_is_recalled_exactly():
    """Acceptance 2: beta = lambda = 1 and unit keys: S k = v after each write, whatever S was; with orthonormal keys
    all of them are still there at the end."""
    s = jnp.asarray(np.random.default_rng(1).standard_normal((1, RANK, RANK)), jnp.float32)
    values = jnp.asarray(np.random.default_rng(2).standard_normal((50, 1, RANK)), jnp.float32)
    for k, v in zip(units(50), values, strict=True):
        s = write(s, k, v, ONES, ONES, limit=1e9)
        np.testing.assert_allclose(jnp.einsum("mvk,mk->mv", s, k, precision="highest"), v, atol=1e-6)

    keys = jnp.linalg.qr(jnp.asarray(np.random.default_rng(3).standard_normal((RANK, RANK)), jnp.float32))[0]
    for k, v in zip(keys, values, strict=False):
        s = write(s, k[None], v, ONES, ONES, limit=1e9)
    for k, v in zip(keys, values, strict=False):
        np.testing.assert_allclose(s[0] @ k, v[0], atol=1e-6)


@pytest.mark.parametrize("fades", [True, False])
@pytest.mark.parametrize("keys", ["random", "nearly the same"])
def test_the_state_is_bounded_over_twenty_thousand_writes(keys, fades):
    """Acceptance 2. Keys that nearly coincide, with values of opposite signs, make the delta rule itself diverge."""
    limit, steps = 8.0, 20_000
    rng = np.random.default_rng(4)
    sign = np.where(np.arange(steps) % 2, 1.0, -1.0)[:, None, None]
    drawn, values = rng.standard_normal((2, steps, 1, RANK))
    if keys != "random":
        drawn, values = np.asarray([1.0, 0.0, 0.0, 0.0]) + 0.01 * sign * np.eye(RANK)[1], np.ones(RANK) * sign
    beta = jnp.full((1, RANK), 0.999)

    @functools.partial(jax.jit, static_argnums=2)
    def norms(k, v, bound):
        def body(s, each):
            s = write(s, *each, beta, 1.0 - beta if fades else jnp.ones((1, RANK)), bound)
            return s, jnp.linalg.norm(s)

        return jax.lax.scan(body, jnp.zeros((1, RANK, RANK)), (k, v))[1]

    operands = (unit(jnp.asarray(drawn, jnp.float32)), jnp.asarray(values, jnp.float32))
    assert np.all(np.asarray(norms(*operands, limit)) <= limit * (1 + 1e-6))
    if keys != "random":
        assert float(jnp.max(norms(*operands, 1e6))) > 10 * limit


def test_within_leaves_a_smaller_state_its_bits():
    s = jnp.asarray(np.random.default_rng(5).standard_normal((2, RANK, RANK)), jnp.float32)
    np.testing.assert_array_equal(within(s, 100.0), s)
    np.testing.assert_allclose(jnp.linalg.norm(within(s, 0.5), axis=(1, 2)), 0.5, rtol=1e-6)
    gradient = jax.grad(lambda s: jnp.sum(within(s, 1.0)))(jnp.zeros((1, RANK, RANK)))
    np.testing.assert_array_equal(gradient, 1.0)


def longhand(state, shared, scale, x_TxD, *, segment=1, keep=False, limit=8.0):
    """The paper's step, in float64: S <- (1 - b) S - b (S k) k^T + b v k^T (lambda = 1: without the first b)."""
    state, shared = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree) for tree in (state, shared))
    out, s = [], list(state["start"])
    sums = [[np.zeros(RANK) for _ in "kvb"] for _ in s]
    one = lambda x: x / np.linalg.norm(x)  # noqa: E731
    for at, h in enumerate(np.asarray(x_TxD, np.float64)):
        rms = h / np.sqrt(np.mean(h * h) + 1e-6)
        y = h.copy()
        for m in range(len(s)):
            q, k = (one(np.tanh(shared[name][m] @ rms)) for name in "qk")
            v, b = shared["v"][m] @ rms, 1 / (1 + np.exp(-(shared["w"][m] @ rms + state["gate"][m] + SHIFT)))
            y += scale * shared["p"][m].T @ (state["gain"][m] * (s[m] @ q))
            sums[m] = [total + new for total, new in zip(sums[m], (k, v, b), strict=True)]
            if (at + 1) % segment == 0:
                k, v, b = one(sums[m][0]), sums[m][1] / segment, sums[m][2] / segment
                kept = s[m] if keep else (1 - b)[:, None] * s[m]
                s[m] = kept - b[:, None] * np.outer(s[m] @ k, k) + b[:, None] * np.outer(v, k)
                s[m] *= min(1.0, limit / np.linalg.norm(s[m]))
                sums[m] = [np.zeros(RANK) for _ in "kvb"]
        out.append(y)
    return np.stack(out)


OPTIONS = [{}, {"keep": True}, {"segment": 3}, {"states": 2}, {"segment": 2, "states": 2, "keep": True, "limit": 0.7}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_text_is_read_and_written_as_the_formula_says(toy, options):
    cohort = toy.cohort("delta_mem", targets=(r"layers\.0\.out",), options=options)
    shared, rng = toy.shared(cohort)["layers.out"], np.random.default_rng(6)
    loud = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    state = jax.tree.map(loud, cohort.abstract())["layers.out"]
    one = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)  # noqa: E731
    x = toy.x(7, batch=2, tokens=11)
    own = cohort.method.delta(one(state), one(shared), jnp.float32(2.0), x, x, lambda x: x)
    start = one(state) | {"start": within(one(state)["start"], options.get("limit", 8.0))}
    written = {name: value for name, value in options.items() if name != "states"}
    for row in range(2):
        want = longhand(start, one(shared), 2.0, x[row], **written)
        np.testing.assert_allclose(own[row], want, rtol=2e-5, atol=2e-5)
    assert float(jnp.max(jnp.abs(own - x))) > 0.1


@pytest.mark.parametrize("options", [{"segment": 0}, {"states": 0}, {"limit": 0.0}, {"limit": float("inf")}], ids=str)
def test_options_that_make_no_memory_are_refused(toy, options):
    [(name, value)] = options.items()
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        toy.cohort("delta_mem", options=options)


CONFIG = ModelConfig(
    vocab_size=40, embed_dim=16, ffw_dim=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_seq_len=64
)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A small model, and two users of one cohort on it."""

    model: Model
    params: dict
    cohort: Cohort
    shared: dict
    users: list

    def bound(self, user=0):
        return bind(self.cohort, self.users[user], self.shared)

    def slots(self, slot, cohort=None, users=None):
        pool = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *(users or self.users))
        return bind_slots(cohort or self.cohort, pool, self.shared, jnp.asarray(slot))

    def hidden(self, tokens, adapt, **options):
        return self.model.hidden(self.params, jnp.asarray(tokens), adapt=adapt, **options)


@pytest.fixture(scope="module", params=[{}, {"segment": 3, "states": 2}], ids=["tokens", "segments"])
def reader(request):
    model = Model(CONFIG)
    params = model.init(jax.random.key(0))
    cohort = Cohort.of(AdapterConfig(method="delta_mem", rank=3, options=request.param), model.sites())
    rng = np.random.default_rng(8)
    loud = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    users = [jax.tree.map(loud, cohort.abstract()) for _ in range(2)]
    return Reader(model, params, cohort, cohort.shared(*model.site_arrays(params)), users)


TEXTS = ([5, 17, 3, 9, 22, 1, 30], [39, 2, 8])
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def test_every_text_of_a_packed_row_begins_anew(reader):
    tokens = [[*TEXTS[0], *TEXTS[1], 0]]
    positions = jnp.asarray([[*range(7), *range(3), -1]])
    segments = jnp.asarray([[1] * 7 + [2] * 3 + [0]])
    own, _ = reader.hidden(tokens, reader.bound(), positions_BxT=positions, segments_BxT=segments)
    for text, where in zip(TEXTS, (slice(0, 7), slice(7, 10)), strict=True):
        alone, _ = reader.hidden([text], reader.bound())
        np.testing.assert_allclose(own[:, where], alone, **CLOSE)


def test_a_cache_goes_on_where_the_text_was_left(reader):
    """Rows of different users and of the base, in steps of 3, 1 and 4 tokens; padding writes nothing."""
    adapt = reader.slots([1, -1, 0])
    text = np.asarray([TEXTS[0], TEXTS[0], [*TEXTS[1], 0, 0, 0, 0]])
    length = np.asarray([7, 7, 3])
    whole, _ = reader.hidden(text, adapt)
    cache = init_cache(CONFIG, 3, 12, memory=adapt.memory)
    for first, last in ((0, 3), (3, 4), (4, 8)):
        at = np.broadcast_to(np.arange(first, last), (3, last - first))
        positions = np.where(at < length[:, None], at, -1)
        tokens = np.take_along_axis(text, np.minimum(at, 6), axis=1)
        own, cache = reader.hidden(tokens, adapt, positions_BxT=jnp.asarray(positions), cache=cache)
        for row in range(3):
            live = positions[row] >= 0
            np.testing.assert_allclose(own[row][live], whole[row][positions[row][live]], **CLOSE)
    assert cache.memory is not None
    np.testing.assert_array_equal(cache.memory[:, 1], 0.0)  # the base remembers nothing
    np.testing.assert_array_equal(cache.memory[:, 2, 3:], 0.0)
    assert np.all(np.any(np.asarray(cache.memory[:, 0, :7]) != 0, axis=-1))


def test_a_new_text_in_an_old_cache_finds_nothing_of_the_last(reader):
    """The state is a session's: position 0 resets it."""
    cache = init_cache(CONFIG, 1, 12, memory=reader.cohort.memory)
    _, used = reader.hidden([TEXTS[0]], reader.bound(), cache=cache)
    fresh, _ = reader.hidden([TEXTS[1]], reader.bound(), cache=cache)
    again, _ = reader.hidden([TEXTS[1]], reader.bound(), cache=used)
    np.testing.assert_array_equal(again, fresh)


def test_two_cohorts_in_one_cache_each_remember_their_own_rows(reader):
    other = Cohort.of(AdapterConfig(method="delta_mem", rank=2), reader.model.sites())
    shared = other.shared(*reader.model.site_arrays(reader.params))
    rng = np.random.default_rng(9)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), other.abstract())
    pool = jax.tree.map(lambda leaf: leaf[:, None], state)
    for links in (([1, -1, -1], [-1, 0, -1]), ([-1, -1, 0], [0, -1, -1])):
        mixed = chain([reader.slots(links[0]), bind_slots(other, pool, shared, jnp.asarray(links[1]))])
        text = np.asarray([TEXTS[0]] * 3)
        whole, _ = reader.hidden(text, mixed)
        cache = init_cache(CONFIG, 3, 12, memory=mixed.memory)
        first, cache = reader.hidden(text[:, :4], mixed, cache=cache)
        positions = jnp.broadcast_to(jnp.arange(4, 7), (3, 3))
        rest, _ = reader.hidden(text[:, 4:], mixed, positions_BxT=positions, cache=cache)
        np.testing.assert_allclose(jnp.concatenate((first, rest), axis=1), whole, **CLOSE)
        alone, _ = reader.hidden(text[:1], bind(other, state, shared))
        np.testing.assert_allclose(whole[links[1].index(0)], alone[0], **CLOSE)


def test_what_cannot_be_remembered_is_refused(reader):
    with pytest.raises(ConfigError, match="keeps no memory"):
        reader.hidden([TEXTS[0]], reader.bound(), cache=init_cache(CONFIG, 1, 12))
    with pytest.raises(ConfigError, match="remember"):
        reader.slots([[0, 0, 1]])
    assert METHOD.kind == "hidden"
    assert reader.cohort.starts_at_base


@pytest.mark.slow
def test_two_stacks_with_latents_and_ranks_of_their_own():
    """Latent attention's cache; dense layers before routed ones, each layer with its own part of the memory."""
    model = Model(CONFIGS["deepseek"])
    params = model.init(jax.random.key(1))
    targets = (TargetRule(pattern=r"layers\.0\.out", rank=3), TargetRule(pattern=".*", rank=2))
    cohort = Cohort.of(AdapterConfig(method="delta_mem", targets=targets), model.sites())
    assert len(cohort.specs) == 2
    rng = np.random.default_rng(10)
    adapter = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), cohort.abstract())
    adapt = bind(cohort, adapter, cohort.shared(*model.site_arrays(params)))
    text = jnp.asarray([TEXTS[0]])
    whole, _ = model.hidden(params, text, adapt=adapt)
    cache, parts = init_cache(model.config, 1, 12, memory=adapt.memory), []
    for first, last in ((0, 4), (4, 7)):
        positions = jnp.arange(first, last)[None]
        part, cache = model.hidden(params, text[:, first:last], positions_BxT=positions, cache=cache, adapt=adapt)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-4)
    after = read_text(model, params, cohort, adapter, cohort.shared(*model.site_arrays(params)), TEXTS[0])
    for name, spec in cohort.specs.items():
        for layer, rank in enumerate(spec.ranks):
            left = cache.memory[spec.info.first_layer + layer, 0, 6]
            start = after[name]["start"][layer]
            np.testing.assert_allclose(left[: start.size].reshape(start.shape), start, rtol=1e-3, atol=1e-3)
            assert np.any(start[:, :rank, :rank] != adapter[name]["start"][layer][:, :rank, :rank])
