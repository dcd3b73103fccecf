"""What a residency refuses."""

from collections.abc import Sequence

from popax.errors import PopulationError
from popax.store.cohort import StoredCohort
from popax.store.manifest import Manifest


def check_slots(adapters: int, slots: int) -> None:
    """Raises PopulationError where so many adapters can never be in the slots at once."""
    if adapters > slots:
        raise PopulationError(
            f"{adapters} adapters in one request, {slots} device slots: ask for fewer at once, or make more slots"
        )


def check_cohort(manifests: Sequence[Manifest], stored: StoredCohort) -> None:
    """Raises PopulationError where one of them is of another cohort than the slots are for."""
    for manifest in manifests:
        if manifest.cohort != stored.id:
            raise PopulationError(
                f"{manifest.shown} ({manifest.config['method']} rank {manifest.config['rank']}) is of cohort "
                f"{manifest.cohort}, these slots are for {stored.id} ({stored.config.method} rank "
                f"{stored.config.rank}): ask a residency of its cohort"
            )
