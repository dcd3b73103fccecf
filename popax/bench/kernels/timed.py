"""Every form of an op on an attached device against the clock: rows, ratios, and the defaults that follow."""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from popax.bench.kernels import clock, composite, tuned
from popax.bench.kernels.clock import Ceilings, Form, Limits
from popax.bench.kernels.megablox import megablox
from popax.kernels import target, tuning
from popax.kernels.dispatch import BACKENDS, XLA
from popax.kernels.op import Op
from popax.kernels.table import OPS

DTYPE = jnp.bfloat16
# A form whose result is farther from XLA's than this (relative 2-norm, bfloat16) computes something else.
MOST_DIFFERENCE = 0.03


class Wish(NamedTuple):
    """What to measure. Regular expressions; "" is everything. tune: try the candidates of block sizes, too."""

    ops: str = ""
    specs: str = ""
    implementations: str = ""
    tune: bool = False


class Candidate(NamedTuple):
    """implementation with blocks (None: its own choice), on one shape."""

    implementation: str
    blocks: Any
    call: Callable[..., Any]


def plan(wish: Wish, ops: Iterable[Op] = OPS) -> list[tuple[Op, Any]]:
    """(op, spec) in order of importance: the acceptance figures', then Qwen3-8B's, then all ops' in turn."""
    everything = (composite.BASE_DECODE, composite.BASE_TRAINING, *ops)
    chosen = [
        (at, op, spec)
        for op in everything
        for at, spec in enumerate(op.specs)
        if re.search(wish.ops, op.name) and re.search(wish.specs, spec.name)
    ]

    def importance(item: tuple[int, Op, Any]) -> tuple[int, int]:
        at, op, spec = item
        if op.name in ("indexed_lora.decode", "base.decode") and spec.name in composite.DECODES.values():
            return 0, 0
        passes = ("stacked_lora.forward", "stacked_lora.backward", "base.training")
        if op.name in passes and spec.name in composite.TRAINING:
            return 1, list(composite.TRAINING).index(spec.name)
        return (2 if "qwen3_8b" in spec.name else 3), at

    return [(op, spec) for _, op, spec in sorted(chosen, key=importance)]


def measure(
    wish: Wish,
    limits: Limits,
    deadline: float,
    *,
    ceilings: Ceilings,
    ops: Iterable[Op] = OPS,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[Op, Any, list[dict[str, Any]]]]:
    """(op, spec, rows) for each of the plan. After time.monotonic() == deadline a spec's row says that it was left."""
    for op, spec in plan(wish, ops):
        if time.monotonic() >= deadline:
            yield op, spec, [{"op": op.name, "spec": spec.name, "left_out": "the budget was spent"}]
            continue
        rows = _measure_spec(op, spec, wish, limits, deadline, ceilings)
        for row in rows:
            say(line(row))
        yield op, spec, rows
        jax.clear_caches()


def _measure_spec(op: Op, spec: Any, wish: Wish, limits: Limits, deadline: float, ceilings: Ceilings):
    head = {"op": op.name, "spec": spec.name, "dtype": jnp.dtype(DTYPE).name}
    cost = op.cost(spec, DTYPE)
    floor = {"floor_seconds": ceilings.floor_s(cost.bytes, cost.flops), "bytes": cost.bytes, "flops": cost.flops}
    try:
        copies = clock.copies_of(op, spec, DTYPE, limits)
    except Exception as error:
        return [head | {"implementation": XLA} | _reason(error)]
    forms: dict[Candidate, Form] = {}
    rows, wanted = [], None
    candidates = _candidates(op, spec, wish)
    names = [candidate.implementation for candidate in candidates]
    for candidate in candidates:
        row = head | {"implementation": candidate.implementation} | floor
        if time.monotonic() >= deadline:
            rows.append(row | {"left_out": "the budget was spent"})
            continue
        try:
            if wish.tune:
                candidate = _tuned(op, spec, candidate, copies, wanted, limits, deadline)
            form = Form(candidate.call, copies, op.donated)
            if candidate.implementation == XLA:
                wanted = form.result
            _check(form, wanted)
            forms[candidate] = form
        except Exception as error:
            # One form that cannot leaves the others their row: not half a table.
            rows.append(row | _reason(error))
    times = _interleaved(forms, limits, deadline)
    for candidate, seconds in times.items():
        if isinstance(seconds, Exception):
            rows.append(head | {"implementation": candidate.implementation} | floor | _reason(seconds))
            continue
        middle, spread = clock.median(seconds)
        blocks = None if candidate.blocks is None else dict(candidate.blocks._asdict())
        measured = {"seconds": middle, "ratio": middle / floor["floor_seconds"], "spread": spread}
        rows.append(
            head
            | {"implementation": candidate.implementation, **measured, **floor}
            | {"blocks": blocks, "copies": len(copies), "repeats": len(seconds)}
        )
    return _judged(op, sorted(rows, key=lambda row: names.index(row["implementation"])))


def _interleaved(forms: Mapping[Candidate, Form], limits: Limits, deadline: float) -> dict[Candidate, Any]:
    """Times of each, or the reason why a device that ran it once did not run it again."""
    try:
        return dict(clock.interleaved(forms, limits, deadline))
    except Exception as error:
        return dict.fromkeys(forms, error)


def _candidates(op: Op, spec: Any, wish: Wish) -> list[Candidate]:
    """XLA's form first, for the others are compared with its result."""
    platform = target.platform()
    kernels = [name for name in BACKENDS.get(platform, ()) if name in op.implementations]
    rivals = dict(op.rivals) | (megablox(op) if platform == "tpu" else {})
    calls = {name: op.implementations[name] for name in (XLA, *kernels)} | rivals
    choice = tuning.choose(composite.TUNED_AS.get(op.name, op.name), target.device_kind(), spec, jnp.dtype(DTYPE).name)
    made = []
    for name, call in calls.items():
        if name != XLA and not re.search(wish.implementations, name):
            continue
        known = choice.blocks if choice and choice.implementation == name and not wish.tune else None
        blocks = op.block_types[name](**known) if known else None
        made.append(Candidate(name, blocks, _with_blocks(call, blocks)))
    return made


def _with_blocks(call: Callable[..., Any], blocks: Any) -> Callable[..., Any]:
    return call if blocks is None else lambda *operands: call(*operands, blocks=blocks)


def _tuned(op: Op, spec: Any, candidate: Candidate, copies, wanted, limits: Limits, deadline: float) -> Candidate:
    """The fastest of the candidate's block sizes, its own choice among them; those that fail are passed over."""
    name = candidate.implementation
    sizes = op.blocks(spec, name) if name in op.block_types else ()
    best, least = candidate, float("inf")
    tries = [
        Candidate(name, blocks, _with_blocks(op.implementations[name], blocks))
        for blocks in ((None, *sizes) if sizes else ())
    ]
    for tried, program in _compiled(tries, copies, op.donated, deadline):
        try:
            form = Form(tried.call, copies, op.donated, program.result())
            _check(form, wanted)
            seconds = min(form.seconds(limits.round_s / 2) for _ in range(3))
        except Exception:
            continue
        if seconds < least:
            best, least = tried, seconds
    return best


def _compiled(tries: list[Candidate], copies, donated: tuple[int, ...], deadline: float):
    """(candidate, the future of its program) for each: compilers run side by side, the device has one at a time."""
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        programs = [pool.submit(clock.compiled, tried.call, copies, donated) for tried in tries]
        for tried, program in zip(tries, programs, strict=True):
            if time.monotonic() >= deadline:
                pool.shutdown(cancel_futures=True)
                return
            yield tried, program


def _check(form: Form, wanted: Any) -> None:
    """Raises ValueError where the result is not XLA's, `wanted` (None: XLA had none). Frees the form's result."""
    apart = 0.0 if wanted is None else clock.difference(form.result, wanted)
    form.result = None
    if not apart <= MOST_DIFFERENCE:
        raise ValueError(f"the result is not XLA's: relative difference {apart:.3g}")


def _reason(error: Exception) -> dict[str, str]:
    text = (str(error).splitlines() or [""])[0][:300]
    if isinstance(error, NotImplementedError):
        return {"skipped": text}
    return {"failed": f"{type(error).__name__}: {text}"}


def _judged(op: Op, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with `over_best_xla`, and `default` on what dispatch should take: a kernel that is ahead, or XLA's form."""
    times = {row["implementation"]: row["seconds"] for row in rows if "seconds" in row}
    kernels = {name for name in op.implementations if name != XLA}
    of_xla = [seconds for name, seconds in times.items() if name not in kernels]
    own = {name: seconds for name, seconds in times.items() if name in op.implementations}
    fastest = min(own, key=lambda name: own[name] * (1.0 if name == XLA else composite.NOISE), default=None)
    judged = []
    for row in rows:
        if "seconds" in row:
            row = row | {"default": row["implementation"] == fastest}
            row |= {"over_best_xla": row["seconds"] / min(of_xla)} if of_xla else {}
        judged.append(row)
    return judged


def tuned_row(op: Op, spec: Any, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of a tuned file that a spec's rows make; None where they have no default, or it is nobody's op.

    None, too, where the budget left out one of the op's own forms: it might have been ahead.
    """
    default = next((row for row in rows if row.get("default")), None)
    unknown = any("left_out" in row for row in rows if row["implementation"] in op.implementations)
    if default is None or unknown or op.name.startswith("base."):
        return None
    keep = ("seconds", "skipped", "failed")
    why = {row["implementation"]: {key: row[key] for key in keep if key in row} for row in rows}
    blocks = default["blocks"]
    made = op.block_types[default["implementation"]](**blocks) if blocks else None
    return tuned.row(op, spec, DTYPE, default["implementation"], made, why)


def line(row: Mapping[str, Any]) -> str:
    """A row as a person reads it."""
    head = f"{row['op']:26s} {row['spec']:38s} {row.get('implementation', ''):14s}"
    if "seconds" not in row:
        return f"{head} {row.get('skipped') or row.get('failed') or row.get('left_out')}"
    best = f" {row['over_best_xla']:6.2f}x best XLA" if "over_best_xla" in row else ""
    mark = " default" if row["default"] else ""
    return f"{head} {row['seconds'] * 1e6:10.1f} us {row['ratio']:7.2f}x floor{best}{mark}"
