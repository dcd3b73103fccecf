"""delta-mem: a small matrix that is written while a text is read, and read before each write (arXiv 2605.12357).

At each token, from the block's output h brought to a root mean square of 1:
  q, k = unit(tanh(Wq h)), unit(tanh(Wk h));  v = Wv h;  beta = sigmoid(w h + gate - 1.5)
  r = S q;  h' = h + scale P^T (gain * r);  S <- Diag(lambda) S + Diag(beta) (v - S k) k^T
with lambda = 1 - beta, or 1 where the option `keep` says so.
A user owns S at the start of a text [R, R], gain [R] (zero at first: the base) and gate [R]. Wq, Wk, Wv, w and P
(orthonormal rows) are drawn once for all users. Unlike the paper's, corrections are added to what a block hands on, not
to its queries, and the projections are not trained.

`segment` tokens are one write: of the mean v and beta and the unit sum of k. `states` such matrices, each with
projections of its own, are written side by side, and what is read of them is added up. After each write S is brought
within the Frobenius norm `limit`, so that no text, however long, makes a correction larger than scale limit |gain|.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from popax.adapters.base import AdapterConfig
from popax.adapters.memory import MemoryForm, one_text
from popax.adapters.method import AdapterMethod, Leaves, SiteBase, SiteDims
from popax.errors import ConfigError

SHIFT = -1.5  # of the writing gate, the paper's
EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """segment: tokens of a write. states: matrices side by side. keep: what is not overwritten stays (lambda = 1);
    otherwise it fades (lambda = 1 - beta). limit: the Frobenius norm that no matrix exceeds. seed: of what is drawn
    for all users."""

    segment: int = 1
    states: int = 1
    keep: bool = False
    limit: float = 8.0
    seed: int = 0

    def __post_init__(self):
        if self.segment < 1 or self.states < 1:
            raise ConfigError(f"segment={self.segment}, states={self.states}: at least 1 token of a write, and 1 state")
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise ConfigError(f"limit={self.limit}: a finite norm above 0")


def write(
    s: jax.Array, k_MxR: jax.Array, v_MxR: jax.Array, beta_MxR: jax.Array, lambda_MxR: jax.Array, limit: float
) -> jax.Array:
    """S [M, R, R] <- Diag(lambda) S + Diag(beta) (v - S k) k^T, then within the Frobenius norm `limit`.

    With lambda = beta = 1 and |k| = 1, S k = v afterwards.
    """
    kept_MxR = jnp.einsum("mvk,mk->mv", s, k_MxR, precision=EXACT)
    return within(lambda_MxR[..., None] * s + (beta_MxR * (v_MxR - kept_MxR))[..., None] * k_MxR[:, None, :], limit)


def within(s: jax.Array, limit: float) -> jax.Array:
    """Each matrix of S [M, R, R], shrunk to the Frobenius norm `limit` where its own is larger."""
    square_M = jnp.sum(jnp.square(s), axis=(1, 2))
    over_M = square_M > limit**2
    factor_M = jnp.where(over_M, limit * jax.lax.rsqrt(jnp.where(over_M, square_M, 1.0)), 1.0)
    return s * factor_M[:, None, None]


def unit(x: jax.Array) -> jax.Array:
    """x / |x| along the last axis, and 0 where x is."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _form(options: Options) -> MemoryForm:
    states, segment = options.states, options.segment
    sums = 3 if segment > 1 else 0  # of k, v and beta, since the last write

    def start(state: Leaves) -> jax.Array:
        rank = state["gain"].shape[-1]
        s = within(state["start"].astype(jnp.float32), options.limit)
        return jnp.concatenate((s.reshape(-1), jnp.zeros(sums * states * rank)))

    def begin(state: Leaves, memory_W: jax.Array) -> Leaves:
        rank = state["gain"].shape[-1]
        return state | {"start": memory_W[: states * rank * rank].reshape(states, rank, rank)}

    def tokens(state: Leaves, shared: Leaves, x_TxD: jax.Array) -> tuple[jax.Array, ...]:
        x_TxD = x_TxD.astype(jnp.float32)
        x_TxD = x_TxD * jax.lax.rsqrt(jnp.mean(jnp.square(x_TxD), axis=-1, keepdims=True) + 1e-6)
        q, k, v, w = (jnp.einsum("td,mrd->tmr", x_TxD, shared[each].astype(jnp.float32)) for each in "qkvw")
        beta = jax.nn.sigmoid(w + state["gate"].astype(jnp.float32)[None] + SHIFT)
        return unit(jnp.tanh(q)), unit(jnp.tanh(k)), v, beta

    def step(memory_W: jax.Array, position: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q_MxR, k_MxR, v_MxR, beta_MxR = token
        rank = q_MxR.shape[-1]
        s = memory_W[: states * rank * rank].reshape(states, rank, rank)
        read_MxR = jnp.einsum("mvk,mk->mv", s, q_MxR, precision=EXACT)
        if segment == 1:
            return written(s, k_MxR, v_MxR, beta_MxR).reshape(-1), read_MxR
        sums_3xMxR = memory_W[states * rank * rank :].reshape(sums, states, rank)
        sums_3xMxR = sums_3xMxR + jnp.stack((k_MxR, v_MxR, beta_MxR))
        whole = (position + 1) % segment == 0
        made = written(s, unit(sums_3xMxR[0]), sums_3xMxR[1] / segment, sums_3xMxR[2] / segment)
        s, sums_3xMxR = jnp.where(whole, made, s), jnp.where(whole, 0.0, sums_3xMxR)
        return jnp.concatenate((s.reshape(-1), sums_3xMxR.reshape(-1))), read_MxR

    def written(s: jax.Array, k_MxR: jax.Array, v_MxR: jax.Array, beta_MxR: jax.Array) -> jax.Array:
        lambda_MxR = jnp.ones_like(beta_MxR) if options.keep else 1.0 - beta_MxR
        return write(s, k_MxR, v_MxR, beta_MxR, lambda_MxR, options.limit)

    def output(state: Leaves, shared: Leaves, scale: jax.Array, read_TxMxR: jax.Array, y_TxD: jax.Array) -> jax.Array:
        gained = read_TxMxR * state["gain"].astype(jnp.float32)[None]
        update = jnp.einsum("tmr,mrd->td", gained, shared["p"].astype(jnp.float32))
        return y_TxD + (scale * update).astype(y_TxD.dtype)

    return MemoryForm(lambda rank: states * (rank * rank + sums * rank), start, begin, tokens, step, output)


def _shared(dims: SiteDims, mask_R: jax.Array, base: SiteBase, options: Options) -> Leaves:
    """Wq, Wk, Wv, w ~ N(0, 1/D); P the orthonormal rows of a random span."""
    shape, key = (options.states, dims.rank, dims.d_in), jax.random.fold_in(base.key, options.seed)
    keys = dict(zip("qkvwp", jax.random.split(key, 5), strict=True))
    drawn = {name: jax.random.normal(key, shape) * mask_R[None, :, None] for name, key in keys.items()}
    spans = jnp.linalg.qr(drawn.pop("p").mT)[0].mT * mask_R[None, :, None]
    return {name: each / math.sqrt(dims.d_in) for name, each in drawn.items()} | {"p": spans}


def _init(key: jax.Array, dims: SiteDims, mask_R: jax.Array, config: AdapterConfig, options: Options) -> Leaves:
    del key, mask_R, config
    vectors = jnp.zeros((options.states, dims.rank))
    return {"start": jnp.zeros((options.states, dims.rank, dims.rank)), "gain": vectors, "gate": vectors}


@functools.cache
def _method(options: Options) -> AdapterMethod:
    form = _form(options)

    def norm(state: Leaves, shared: Leaves, scale: jax.Array) -> jax.Array:
        """What a correction at any token of any text is at most: |scale| limit (|gain| of each state, added up)."""
        del shared
        return jnp.abs(scale) * options.limit * jnp.sum(jnp.linalg.norm(state["gain"], axis=-1))

    return AdapterMethod(
        name="delta_mem",
        state_axes={"start": ("vector", "rank", "rank"), "gain": ("vector", "rank"), "gate": ("vector", "rank")},
        shared_axes=dict.fromkeys("qkvwp", ("vector", "rank", "in")),
        shared=_shared,
        init=_init,
        delta=one_text(form),
        norm=norm,
        shrink=lambda state, factor: state | {"gain": state["gain"] * factor},
        inits={"default": True},
        linear=False,
        learning_rate=5e-2,
        kind="hidden",
        memory=form,
        options=Options,
        variant=lambda config: _method(Options(**dict(config.options))),
    )


METHOD = _method(Options())
