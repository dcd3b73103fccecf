"""What a session leaves behind, kept: a user's texts then begin with the state that reading another text ended in.

Nothing is trained. The next revision is the last one with another start, and the text itself is kept nowhere.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.apply import bind
from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.adapters.table import METHODS, method_of
from popax.errors import BaseMismatchError, ConfigError, DataError
from popax.modeling.base import Base
from popax.modeling.cache import init_cache
from popax.modeling.model import Model
from popax.serving.generate import power_of_two
from popax.store.catalog import Catalog
from popax.store.compose import Term, part_of
from popax.store.manifest import Manifest
from popax.types import AdapterState, Params

Progress = Callable[[int], None]


def read_text(
    model: Model,
    params: Params,
    cohort: Cohort,
    adapter: AdapterState,
    shared: AdapterState,
    tokens: Sequence[int],
    progress: Progress = lambda count: None,
) -> AdapterState:
    """The adapter whose texts begin as this one ends, read from its own start.

    A text longer than the model's context is read in windows of it: what is remembered goes from one to the next, keys
    and values do not. progress: told how many tokens have been read. Raises ConfigError where the cohort's method
    remembers nothing, DataError for an empty text.
    """
    check_memory(cohort.config)
    if not len(tokens):
        raise DataError("there is nothing to read: the text has no tokens")
    most = model.config.max_seq_len
    for first in range(0, len(tokens), most):
        window = np.asarray(tokens[first : first + most], np.int32)
        width = min(most, power_of_two(len(window)))  # few widths are compiled
        positions_T = np.where(np.arange(width) < len(window), np.arange(width), -1).astype(np.int32)
        window_T = np.pad(window, (0, width - len(window)))
        adapter = _after(model, cohort, params, adapter, shared, window_T, positions_T)
        progress(first + len(window))
    return adapter


def forget(cohort: Cohort, adapter: AdapterState) -> AdapterState:
    """The adapter whose texts begin with nothing remembered. Raises ConfigError as `read_text` does."""
    check_memory(cohort.config)
    return _beginning(cohort, adapter, lambda first, count: jnp.zeros((count, cohort.memory)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _after(model, cohort, params, adapter, shared, tokens_T, positions_T) -> AdapterState:
    cache = init_cache(model.config, 1, tokens_T.shape[0], memory=cohort.memory)
    _, cache = model.hidden(
        params, tokens_T[None], positions_BxT=positions_T[None], cache=cache, adapt=bind(cohort, adapter, shared)
    )
    assert cache is not None
    assert cache.memory is not None
    memory_LxW = cache.memory[:, 0, jnp.max(positions_T)]
    return _beginning(cohort, adapter, lambda first, count: memory_LxW[first : first + count])


def _beginning(cohort: Cohort, adapter: AdapterState, memory_of: Callable[[int, int], jax.Array]) -> AdapterState:
    """memory_of(first, count): of the model's layers first .. first + count - 1."""
    form, begun = cohort.method.memory, dict(adapter)
    assert form is not None
    for name, spec in cohort.specs.items():
        memory_LxW = memory_of(spec.info.first_layer, spec.info.layers)[:, : form.width(spec.rank)]
        state = jax.vmap(form.begin)(adapter[name], memory_LxW)
        begun[name] = jax.tree.map(lambda new, old: new.astype(old.dtype), state, adapter[name])
    return begun


def check_memory(config: AdapterConfig) -> None:
    """Raises ConfigError where the config's method remembers nothing."""
    if method_of(config).memory is None:
        named = ", ".join(repr(name) for name, row in METHODS.items() if row.memory is not None)
        raise ConfigError(f"method={config.method!r} remembers nothing of what it reads: train users with {named}")


def remember(
    base: Base,
    catalog: Catalog,
    manifest: Manifest,
    tokens: Sequence[int] | None,
    progress: Progress = lambda count: None,
) -> Manifest:
    """Commit what this revision has become after these tokens, as the user's next revision; None: forget all of it.

    Its provenance has the tokens' digest and number beside the revision's own. Raises BaseMismatchError for another
    base's adapter, and what `read_text` and `Catalog.commit` raise.
    """
    if manifest.base_digest != base.digest:
        raise BaseMismatchError(
            f"{manifest.shown} was made for the base {manifest.base_digest}, this one is {base.digest}: give that base"
        )
    cohort, *arrays, _ = part_of(catalog, Term(manifest))
    adapter, shared = jax.tree.map(jnp.asarray, arrays)
    if tokens is None:
        adapter, read = forget(cohort, adapter), {"tokens": 0}
    else:
        adapter = read_text(base.model, base.params, cohort, adapter, shared, tokens, progress)
        digest = hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest()
        read = {"tokens": len(tokens), "digest": digest}
    return catalog.commit(
        catalog.cohort_of(manifest),
        manifest.user,
        jax.tree.map(np.asarray, adapter),
        provenance={**manifest.provenance, "remembered": read},
        hparams=manifest.hparams,
        derived_from=[(manifest.user, manifest.revision)],
    )
