"""A clock for short device programs: inputs that no cache holds, compared forms in turn, medians."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from popax.kernels.op import Op, nbytes

# Together more than any device's last cache: a call never finds its operands there from the call before.
COLD_BYTES = 192 << 20
MOST_COPIES = 16
SLOW_S = 0.25
LONG_S = 0.01  # a matmul that takes this long is large enough to fill the device
NARROW = {"d_in": 8, "d_out": 8, "embed": 8}


class Limits(NamedTuple):
    """memory: bytes that a shape's operands and results may take. round_s: device time of a round of one form."""

    memory: int
    repeats: int = 5
    round_s: float = 0.02
    cold_bytes: int = COLD_BYTES


class Ceilings(NamedTuple):
    """What the device reaches: bytes read and written by a copy, and operations of a square matmul, in a second."""

    bytes_per_s: float
    flops_per_s: float

    def floor_s(self, nbytes: int, flops: int) -> float:
        return max(nbytes / self.bytes_per_s, flops / self.flops_per_s)


class Form:
    """One compiled form of an op's call on every copy of its operands, one call after the other in one program.

    The results that take a donated operand's shape are the next program's operands, as a layer's output is: a form that
    updates in place need not copy, and one that does not is not charged for it. result: of the first copy's first call.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        copies: Sequence[tuple[Any, ...]],
        donated: tuple[int, ...],
        program: Any = None,
    ):
        """program: what `compiled` made of the same arguments, where it was made beforehand."""
        self._program = program or compiled(call, copies, donated)
        given, self._kept = _divided(copies, donated)
        self._given = jax.tree.map(jnp.copy, given)
        taken, left = self._program(self._given, self._kept)
        self._given = list(taken)
        self.result = jax.tree.map(jnp.copy, (taken[0], left[0]))
        del taken, left
        # The first run has had whatever happens once; a slow form need not be run again to be known as one.
        self._estimate_s = self._once(1)
        if not self.slow:
            self._estimate_s = self._once(2)

    @property
    def slow(self) -> bool:
        """Whether one program takes so long that the clock and the rounds around it do not matter."""
        return self._estimate_s * len(self._kept) > SLOW_S

    def seconds(self, round_s: float) -> float:
        """Seconds a call, over about round_s of calls in a row: the host must stay ahead of the device."""
        return self._once(max(1, min(64, math.ceil(round_s / (self._estimate_s * len(self._kept))))))

    def _once(self, programs: int) -> float:
        begin = time.perf_counter()
        for _ in range(programs):
            taken, left = self._program(self._given, self._kept)
            self._given = list(taken)
        jax.block_until_ready((taken, left))
        return (time.perf_counter() - begin) / (programs * len(self._kept))


def compiled(call: Callable[..., Any], copies: Sequence[tuple[Any, ...]], donated: tuple[int, ...]) -> Any:
    """The program of a `Form`; nothing runs on the device, so that several may be compiled at a time."""

    def run(given, kept):
        results = [call(*_joined(own, rest, donated)) for own, rest in zip(given, kept, strict=True)]
        # Every result leaves the program: what nobody takes would not be computed.
        return tuple(zip(*map(_taken, given, results), strict=True))

    return jax.jit(run, donate_argnums=0).lower(*_divided(copies, donated)).compile()


def _divided(copies: Sequence[tuple[Any, ...]], donated: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
    """(what is given up, what is kept) of each copy."""
    kept = [tuple(each for at, each in enumerate(one) if at not in donated) for one in copies]
    return [tuple(one[at] for at in donated) for one in copies], kept


def _joined(own: tuple[Any, ...], rest: tuple[Any, ...], donated: tuple[int, ...]) -> list[Any]:
    given, kept = iter(own), iter(rest)
    return [next(given) if at in donated else next(kept) for at in range(len(own) + len(rest))]


def _taken(own: tuple[Any, ...], result: Any) -> tuple[tuple[Any, ...], list[Any]]:
    """(own with the first results of the same shapes in its place, the results that are left)."""
    leaves, tree = jax.tree.flatten(own)
    left, taken = list(jax.tree.leaves(result)), []
    for leaf in leaves:
        same = (at for at, each in enumerate(left) if (each.shape, each.dtype) == (leaf.shape, leaf.dtype))
        at = next(same, None)
        taken.append(leaf if at is None else left.pop(at))
    return jax.tree.unflatten(tree, taken), left


def difference(result: Any, wanted: Any) -> float:
    """The largest |result - wanted| / |wanted| (2-norms) of two trees' leaves, of those whose shapes agree."""
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=False)
    return max((float(_apart(got, want)) for got, want in pairs if got.shape == want.shape), default=0.0)


@jax.jit
def _apart(got: jax.Array, want: jax.Array) -> jax.Array:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.linalg.norm((got - want).ravel()) / jnp.maximum(jnp.linalg.norm(want.ravel()), 1e-30)


def median(times: Sequence[float]) -> tuple[float, float]:
    """(the median, half the distance between the quartiles over it)."""
    middle = statistics.median(times)
    low, high = np.quantile(times, (0.25, 0.75))
    return middle, float(high - low) / 2 / middle


def interleaved(forms: Mapping[Any, Form], limits: Limits, deadline: float = math.inf) -> dict[Any, list[float]]:
    """Times of every form, a round of each in turn and from a new first one: a clock that slows down hits all.

    A slow form has two rounds at most, and after time.monotonic() == deadline no form has a second one.
    """
    names, times = list(forms), {name: [] for name in forms}
    for repeat in range(limits.repeats):
        for at in range(len(names)):
            name = names[(at + repeat) % len(names)]
            if repeat and (time.monotonic() >= deadline or (forms[name].slow and repeat > 1)):
                continue
            times[name].append(forms[name].seconds(limits.round_s))
    return times


def copies_of(op: Op, spec: Any, dtype: Any, limits: Limits) -> list[tuple[Any, ...]]:
    """The call's operands on the device, as often as it takes for their cost in bytes to exceed the caches.

    Numbers are drawn on the device; slots, ranks and targets are the op's own example. Raises NotImplementedError where
    not even one set and its results fit in limits.memory.
    """
    operands = op.operands(spec, dtype)
    held = nbytes(operands) + nbytes(jax.eval_shape(op.implementations["xla"], *operands))
    if held > limits.memory:
        raise NotImplementedError(f"operands and results of about {held} bytes; the limit is {limits.memory}")
    wanted = math.ceil(limits.cold_bytes / max(op.cost(spec, dtype).bytes, 1))
    count = max(1, min(MOST_COPIES, wanted, limits.memory // held))
    return [_drawn(op, spec, dtype, operands, seed) for seed in range(count)]


def _drawn(op: Op, spec: Any, dtype: Any, operands: Any, seed: int) -> tuple[Any, ...]:
    fields: dict[str, Any] = {name: size for name, size in NARROW.items() if name in spec._fields}
    if "d_outs" in spec._fields:
        fields["d_outs"] = (8,) * len(spec.d_outs)
    example = jax.tree.leaves(op.example(spec._replace(**fields), dtype, seed))
    keys = iter(jax.random.split(jax.random.key(seed), len(example)))
    leaves, tree = jax.tree.flatten(operands)
    arrays = []
    for leaf, small, key in zip(leaves, example, keys, strict=True):
        if leaf.dtype == jnp.int32 and small.shape == leaf.shape:
            arrays.append(jnp.asarray(small))
        elif jnp.issubdtype(leaf.dtype, jnp.floating):
            arrays.append(_normal(key, leaf.shape, leaf.dtype))
        else:
            arrays.append(jax.random.randint(key, leaf.shape, -100, 100).astype(leaf.dtype))
    return jax.tree.unflatten(tree, arrays)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)


def ceilings(memory: int, dtype: Any) -> Ceilings:
    """Measured now on the default device: copies of a sixteenth of the memory at most, and square matmuls.

    The best of several rounds, where everything else is a median: a floor must not be too high.
    """
    entries = min(1 << 29, max(1 << 20, memory // 16 // jnp.dtype(dtype).itemsize))
    # A loop's copy, and the driver's own.
    copied = [Form(copy, [(jnp.ones((entries,), dtype),)], ()) for copy in (lambda x: -x, jnp.copy)]
    copy_s = min(form.seconds(0.05) for form in copied for _ in range(5))
    flops_per_s, side = 0.0, 512
    while side <= 8192:
        square = jnp.ones((side, side), dtype)
        product = Form(lambda x, y: x @ y, [(square, square)], ())
        seconds = min(product.seconds(0.05) for _ in range(3))
        flops_per_s = max(flops_per_s, 2 * side**3 / seconds)
        side = 2 * side if seconds < LONG_S else 8193
    return Ceilings(2 * entries * jnp.dtype(dtype).itemsize / copy_s, flops_per_s)
