"""Optimizers and schedules as JSON values: what a run's record keeps of them, and compares when the run goes on."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

from popax.population.optimizer import StandardOptimizer, of_rate

# What was recorded of schedules while they were closures (to commit 5570f37): a name, without their arguments.
_FORMER = {
    "constant_factor": "constant.<locals>.<lambda>",
    "warmup_constant_factor": "warmup_constant.<locals>.<lambda>",
    "warmup_cosine_factor": "warmup_cosine.<locals>.factor",
}
_DEEPEST = 4


def described(function: Callable[..., Any], *, depth: int = 0) -> Any:
    """{"name", **arguments} of a partial; the same of a function that is made inside another one, where its arguments
    are what it closes over and its defaults. Else its name.

    Two functions that differ in their code alone have one description.
    """
    if isinstance(function, StandardOptimizer):
        return {"name": function.name, **{name: _value(value, depth) for name, value in function.settings}}
    if isinstance(function, functools.partial) and function.func is of_rate:
        return described(function.keywords["made_by"], depth=depth)
    if isinstance(function, functools.partial):
        name, inner = _named(described(function.func, depth=depth))
        positional = {str(at): _value(value, depth) for at, value in enumerate(function.args)}
        keywords = {key: _value(value, depth) for key, value in function.keywords.items()}
        return {"name": name, **inner, **positional, **keywords}
    name = getattr(function, "__qualname__", None) or type(function).__name__
    held = _held(function, depth) if inspect.isfunction(function) and "<" in name else {}
    return {"name": name, **held} if held else name


def compared(recorded: Any, now: Any) -> Literal["same", "unknown", "other"]:
    """Whether a run's record names the optimizer or schedule that is `described` as `now`.

    "unknown": it is one of this name, recorded without its arguments or by another formula (`_FORMER`). A run that
    stopped under it cannot go on bitwise; one that is finished may be gone on from.
    """
    name = _named(now)[0]
    if recorded == now or (name == "constant_factor" and recorded == _FORMER[name]):
        return "same"
    return "unknown" if isinstance(recorded, str) and recorded in (name, _FORMER.get(name)) else "other"


def _named(description: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(description, str):
        return description, {}
    return description["name"], {name: value for name, value in description.items() if name != "name"}


def _held(function: Any, depth: int) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    parameters = inspect.signature(function).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    closed = {name: cell.cell_contents for name, cell in cells}
    return {name: _value(value, depth) for name, value in (closed | defaults).items()}


def _value(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_value(one, depth) for one in value]
    if callable(value) and not isinstance(value, type):
        # A function may close over itself.
        return described(value, depth=depth + 1) if depth < _DEEPEST else getattr(value, "__qualname__", "")
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text
