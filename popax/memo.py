"""Functions that are built once for equal arguments, so that `jax.jit` traces and compiles each once in a process."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def built_once(build: Callable[P, T], *, kept: int = 16) -> Callable[P, T]:
    """`build`, whose last `kept` results are given again for equal arguments; those without a hash are built anew.

    build: pure, from settings to a function. No array may be among the arguments: it would live as long as the result.
    """
    # typed: 1, 1.0 and True are equal, and are not the same setting.
    remembered = functools.lru_cache(maxsize=kept, typed=True)(build)

    @functools.wraps(build)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            hash((args, tuple(kwargs.items())))
        except TypeError:
            return build(*args, **kwargs)
        return remembered(*args, **kwargs)

    return call


@built_once
def partial_of(function: Callable[..., T], **settings: Any) -> Callable[..., T]:
    """`functools.partial`, the same one for equal settings: partials themselves are never equal."""
    return functools.partial(function, **settings)
