"""Every cohort's slots beside one engine: requests in, the sets of slots of a step out."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from popax.adapters.cohort import Cohort
from popax.errors import ServingError
from popax.residency import Residency
from popax.residency.request import Key
from popax.serving.request import Answer, Term
from popax.serving.step import SlotSets
from popax.store.catalog import Catalog
from popax.store.cohort import StoredCohort

Held = list[tuple[Residency, list[Key]]]


class Rooms:
    """A residency for each cohort; of one answer, `terms` adapters of each cohort at most (they are summed).

    `fetch` may be called by any thread; all else by the engine's, which alone changes who is in a slot.
    """

    def __init__(
        self,
        catalog: Catalog,
        cohorts: Sequence[StoredCohort],
        *,
        slots: int,
        host_bytes: int,
        terms: int,
        sharding: jax.sharding.Sharding | None = None,
    ):
        self.terms, self.slots, self.host_bytes = terms, slots, host_bytes
        if terms > slots:
            raise ServingError(f"sums of {terms} adapters on {slots} slots: a request could never get them")
        options = {"slots": slots, "host_bytes": host_bytes, "sharding": sharding}
        self._residencies = {cohort.id: Residency(catalog, cohort, **options) for cohort in cohorts}
        experts = [
            one.cohort for one in self._residencies.values() if any(spec.info.experts for spec in one.cohort.sites)
        ]
        if len(experts) > 1:
            raise ServingError(
                f"{len(experts)} cohorts have adapters on routed experts, which one batch does not mix: name one of "
                "them to be served"
            )

    @property
    def cohorts(self) -> tuple[Cohort, ...]:
        return tuple(residency.cohort for residency in self._residencies.values())

    @property
    def residencies(self) -> Mapping[str, Residency]:
        """By the cohort's id."""
        return self._residencies

    def check(self, terms: Sequence[Term]) -> None:
        """Raises ServingError where a cohort has no slots here, or too many of one are to be summed."""
        count: dict[str, int] = {}
        for manifest, _ in terms:
            count[manifest.cohort] = count.get(manifest.cohort, 0) + 1
            if manifest.cohort not in self._residencies:
                raise ServingError(
                    f"{manifest.shown} ({manifest.config['method']} rank {manifest.config['rank']}) is of cohort "
                    f"{manifest.cohort}, which this server has no slots for: its cohorts are "
                    f"{', '.join(self._residencies) or 'none'}; start it again to serve new ones"
                )
        if max(count.values(), default=0) > self.terms:
            raise ServingError(
                f"a sum of {max(count.values())} adapters of one cohort: this server adds {self.terms} at most"
            )
        remembering = sum(number for cohort, number in count.items() if self._residencies[cohort].cohort.memory)
        if remembering > 1:
            raise ServingError(
                f"a sum of {remembering} adapters that remember what they read: a text has one such memory"
            )

    def virtual_tokens(self, terms: Sequence[Term]) -> int:
        """How many virtual tokens these adapters put before a prompt; `check` has let them pass."""
        return max((self._residencies[term.manifest.cohort].cohort.virtual_tokens for term in terms), default=0)

    def fetch(self, terms: Sequence[Term]) -> list:
        """Begin to bring these adapters' rows; an array, or the promise of one, for each. `check` has let them pass."""
        return [self._residencies[term.manifest.cohort].fetch([term.manifest])[0] for term in terms]

    def row_bytes(self, terms: Sequence[Term]) -> int:
        """Of the rows of these adapters together."""
        return sum(self._residencies[term.manifest.cohort].stored.layout.row_bytes for term in terms)

    def hold(self, answer: Answer) -> bool:
        """Its adapters' slots, kept until `release`; False where one is not free. Raises what kept a row from being
        read."""
        held: Held = []
        rows = [row if isinstance(row, np.ndarray) else row.result() for row in answer.loading or ()]
        wanted: dict[str, dict[Key, np.ndarray]] = {}
        for (manifest, _), row in zip(answer.request.terms, rows, strict=True):
            wanted.setdefault(manifest.cohort, {})[Key.of(manifest)] = row
        for cohort, rows_of in wanted.items():
            residency = self._residencies[cohort]
            keys = residency.hold(rows_of)
            if keys is None:
                self._let_go(held)
                return False
            held.append((residency, keys))
        answer.hold = held
        return True

    def release(self, answer: Answer) -> None:
        """The inverse of `hold`; nothing where it holds none."""
        self._let_go(answer.hold or [])
        answer.hold = None

    def sets(self, samples: Mapping[int, Answer], count: int) -> tuple[SlotSets, ...]:
        """The slots of a step's `count` sampled rows: samples[row] is whose it is, the others are nobody's."""
        found = []
        for cohort, residency in self._residencies.items():
            slots = [np.full(count, -1, np.int32) for _ in range(self.terms)]
            weights = [np.ones(count, np.float32) for _ in range(self.terms)]
            for row, answer in samples.items():
                own = [term for term in answer.request.terms if term.manifest.cohort == cohort]
                for at, (manifest, weight) in enumerate(own):
                    slots[at][row], weights[at][row] = residency.slot(Key.of(manifest)), weight
            found.append(SlotSets(residency.adapters, residency.shared, tuple(slots), tuple(weights)))
        return tuple(found)

    def close(self) -> None:
        for residency in self._residencies.values():
            residency.close()

    def _let_go(self, held: Held) -> None:
        for residency, keys in held:
            residency.let_go(keys)


def rooms_of(
    catalog: Catalog | None, base_digest: str, *, slots: int, host_bytes: int, terms: int, sharding=None
) -> Rooms | None:
    """Rooms for every cohort of the catalog that was made for this base; None without a catalog."""
    if catalog is None:
        return None
    cohorts = [cohort for cohort in catalog.cohorts() if cohort.base_digest == base_digest]
    return Rooms(catalog, cohorts, slots=slots, host_bytes=host_bytes, terms=terms, sharding=sharding)
