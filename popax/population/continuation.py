"""What a user's training needs beside the adapter to go on exactly: the optimizer's state, the step and the key."""

from typing import Any

import jax
import jax.numpy as jnp

from popax.errors import PopulationError
from popax.population.state import HParams, PopulationState

_SEPARATOR = ":"  # no site is named with it


def continuation(member: PopulationState) -> dict[str, Any]:
    """The state that belongs to `selected_adapters`, as a nested dict of arrays: what `continued` takes back.

    Raises PopulationError where the member tracks a best adapter without the optimizer's state of that moment.
    """
    opt_state, step = member.opt_state, member.step
    if member.best is not None:
        if member.best.opt_state is None:
            raise PopulationError(
                "the best adapter was tracked without its optimizer: make it with keep_optimizer=True"
            )
        opt_state, step = member.best.opt_state, member.best.step
    return {"optimizer": dict(_named(opt_state)), "step": step, "rng": member.rng}


def continued(fresh: PopulationState, kept: dict[str, Any]) -> PopulationState:
    """A member at step 0 (`init_member` from the kept adapter), put where the kept training stood.

    Its own max_steps more steps come after the kept ones. Raises PopulationError where the kept state is another
    optimizer's.
    """
    wanted = _named(fresh.opt_state)
    found = kept["optimizer"]
    if _shapes(dict(wanted)) != _shapes(found):
        differing = sorted(set(_shapes(dict(wanted)).items()) ^ set(_shapes(found).items()))
        raise PopulationError(
            f"the optimizer's state that was kept is of another optimizer than this run's (differing: "
            f"{', '.join(name for name, _ in differing[:4])}); continue with the one that it was trained with, or "
            "without keep_optimizer"
        )
    leaves = [jnp.asarray(found[name]) for name, _ in wanted]
    opt_state = jax.tree.unflatten(jax.tree.structure(fresh.opt_state), leaves)
    step = jnp.asarray(kept["step"])
    settings: HParams = fresh.hparams
    best = fresh.best
    return fresh._replace(
        step=step,
        opt_state=opt_state,
        hparams=settings._replace(max_steps=settings.max_steps + step),
        rng=jnp.asarray(kept["rng"]),
        best=best if best is None else best._replace(opt_state=jax.tree.map(jnp.copy, opt_state), step=step),
    )


def _named(opt_state: Any) -> list[tuple[str, Any]]:
    """Leaves by their paths, in the order in which they are flattened."""
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    return [(jax.tree_util.keystr(path, simple=True, separator=_SEPARATOR), leaf) for path, leaf in leaves]


def _shapes(named: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(leaf.shape), leaf.dtype.name) for name, leaf in named.items()}
