"""What a user's training needs beside the adapter to go on exactly: the optimizer's state, the step and the key."""

from typing import Any

import jax
import jax.numpy as jnp

from popax.adapters.cohort import Cohort
from popax.adapters.masters import has_masters
from popax.errors import PopulationError
from popax.population.state import PopulationState, selected_adapters
from popax.types import HParams

_SEPARATOR = ":"  # no site is named with it
_MASTERS = "masters"


def resume_state(cohort: Cohort, member: PopulationState) -> dict[str, Any]:
    """The state that belongs to `stored_adapters`, as a nested dict of arrays: what `resumed` takes back. The
    masters are part of it where they are more than what is stored.

    Raises PopulationError where the member tracks a best adapter without the optimizer's state of that moment.
    """
    opt_state, step = member.opt_state, member.step
    if member.best is not None:
        if member.best.opt_state is None:
            raise PopulationError(
                "the best adapter was tracked without its optimizer: make it with save_optimizer_state=True"
            )
        opt_state, step = member.best.opt_state, member.best.step
    kept = {"optimizer": dict(_named(opt_state)), "step": step, "rng": member.rng}
    return kept | ({_MASTERS: selected_adapters(member)} if has_masters(cohort) else {})


def resumed(fresh: PopulationState, kept: dict[str, Any]) -> PopulationState:
    """A member at step 0 (`init_member` from the kept adapter), put where the kept training stood.

    Its own max_steps more steps come after the kept ones. A state that was kept in fewer bits than it has now goes on
    from what it holds. Raises PopulationError where the kept state is another optimizer's.
    """
    wanted = _named(fresh.opt_state)
    found = _widened(kept["optimizer"], dict(wanted))
    if _shapes(dict(wanted)) != _shapes(found):
        differing = sorted(set(_shapes(dict(wanted)).items()) ^ set(_shapes(found).items()))
        raise PopulationError(
            f"the optimizer's state that was kept is of another optimizer than this run's (differing: "
            f"{', '.join(name for name, _ in differing[:4])}); continue with the one that it was trained with, or "
            "without save_optimizer_state"
        )
    leaves = [jnp.asarray(found[name]) for name, _ in wanted]
    opt_state = jax.tree.unflatten(jax.tree.structure(fresh.opt_state), leaves)
    step = jnp.asarray(kept["step"])
    settings: HParams = fresh.hparams
    best, adapters = fresh.best, fresh.adapters
    if _MASTERS in kept:
        adapters = jax.tree.map(jnp.asarray, kept[_MASTERS])
        best = best if best is None else best._replace(adapter=jax.tree.map(jnp.copy, adapters))
    return fresh._replace(
        step=step,
        adapters=adapters,
        opt_state=opt_state,
        hparams=settings._replace(max_steps=settings.max_steps + step),
        rng=jnp.asarray(kept["rng"]),
        best=best if best is None else best._replace(opt_state=jax.tree.map(jnp.copy, opt_state), step=step),
    )


def _widened(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """float16 and bfloat16 leaves in float32, where that is wanted."""

    def at(name: str, leaf: Any) -> Any:
        if name not in wanted or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        own = wanted[name].dtype
        return leaf.astype(own) if own == jnp.float32 and leaf.dtype.itemsize < own.itemsize else leaf

    return {name: at(name, leaf) for name, leaf in found.items()}


def _named(opt_state: Any) -> list[tuple[str, Any]]:
    """Leaves by their paths, in the order in which they are flattened."""
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    return [(jax.tree_util.keystr(path, simple=True, separator=_SEPARATOR), leaf) for path, leaf in leaves]


def _shapes(named: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(leaf.shape), leaf.dtype.name) for name, leaf in named.items()}
