"""The four columns for adapters that are in a catalog."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.cohort import Cohort
from popax.errors import DataError, PopulationError
from popax.evaluation.columns import COLUMNS, EvalConfig, HeldOut, Scorer, UserScores, four_columns
from popax.modeling.base import Base
from popax.objectives.sft import sft
from popax.serving.pool import check_one_cohort, one_cohort
from popax.store.catalog import Catalog
from popax.store.records import shown
from popax.types import AdapterState

EVERYONE = "everyone"  # under this id the shared adapter is kept, in a catalog of its own


def catalog_columns(
    base: Base,
    data: HeldOut,
    catalog: Catalog,
    users: Sequence[str],
    config: EvalConfig,
    *,
    everyone: Catalog | None = None,
    on_group: Callable[[int], None] = lambda users: None,
) -> list[UserScores]:
    """`four_columns` of these users' latest revisions; everyone: the catalog that holds the shared adapter.

    on_group(users scored) is called group by group: 3 times for each user, 4 with the shared column. Raises
    PopulationError where they belong to several cohorts, BaseMismatchError where one was made for another base.
    """
    if not users:
        raise DataError("no users to evaluate: none of the catalog's is in the data")
    first = catalog.load(users[0], base_digest=base.digest)[1]
    cohort, shared = one_cohort(catalog, [first])

    def own(group: Sequence[str]) -> AdapterState:
        distinct = list(dict.fromkeys(group))
        loaded = catalog.load_batch(distinct, base_digest=base.digest)
        check_one_cohort([first, *(manifest for _, manifest in loaded)])
        adapters = dict(zip(distinct, (adapter for adapter, _ in loaded), strict=True))
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(adapters[user] for user in group))

    same = None
    if everyone is not None:
        alone = load_everyone(everyone, cohort, base.digest)
        same = lambda group: jax.tree.map(  # noqa: E731
            lambda leaf: jnp.broadcast_to(leaf, (len(group), *leaf.shape)), alone
        )
    scorer = Scorer(sft(base.model), cohort, base.params, shared, config)
    return four_columns(scorer, _Counted(data, on_group), users, own, same)


def load_everyone(catalog: Catalog, cohort: Cohort, base_digest: str) -> AdapterState:
    """The shared adapter, [L, ...]. Raises PopulationError where it is of another cohort than the users' own."""
    adapter, manifest = catalog.load(EVERYONE, base_digest=base_digest)
    config = catalog.cohort_of(manifest).config
    if config != cohort.config:
        raise PopulationError(
            f"the shared adapter is {config}, the users' are {cohort.config}: compare adapters of one configuration"
        )
    return adapter


def table_lines(scores: Sequence[UserScores], figures: Mapping[str, Any], max_rows: int = 10) -> Iterator[str]:
    """The table for a screen: the first max_rows users, the mean, and how often the own adapter is better."""
    width = max([12, *(len(shown(row.user)) for row in scores[:max_rows])])
    head = "".join(f"{name:>9}" for name in COLUMNS)
    yield f"{'bits per byte':<{width}}{head}"
    for row in scores[:max_rows]:
        yield f"{shown(row.user):<{width}}" + "".join(f"{_cell(getattr(row, name)):>9}" for name in COLUMNS)
    if len(scores) > max_rows:
        yield f"... and {len(scores) - max_rows} more users"
    means = "".join(f"{_cell(figures[f'mean_{name}_bits_per_byte']):>9}" for name in COLUMNS)
    yield f"{'mean':<{width}}{means}"
    yield (
        f"of {figures['users']} users, the own adapter beats: base {_percent(figures['own_beats_base'])}, "
        f"shared {_percent(figures['own_beats_shared'])}, another user's {_percent(figures['own_beats_wrong'])}"
    )


def _cell(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"


def _percent(fraction: float) -> str:
    return "-" if np.isnan(fraction) else f"{100 * fraction:.0f}%"


@dataclasses.dataclass(frozen=True)
class _Counted:
    """The data, telling how many users' text has been asked for."""

    data: HeldOut
    tell: Callable[[int], None]

    def evaluation(self, users: Sequence[str | None], split: str, max_rows: int | None = None):
        batch = self.data.evaluation(users, split, max_rows)
        self.tell(len(set(users)))
        return batch
