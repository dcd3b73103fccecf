"""Groups of sites that share what a user owns."""

import math
from collections.abc import Sequence

import numpy as np

from popax.adapters.base import SiteSpec
from popax.errors import ConfigError


def groups_of(sites: Sequence[SiteSpec], count: int) -> dict[str, np.ndarray]:
    """{site: its group at each layer}: stretches of equal length in the order of depth, sites outside the stacks last.

    Raises ConfigError for more groups than adapted matrices.
    """
    places = [
        (spec.info.first_layer + layer if spec.info.layers else math.inf, index, layer)
        for index, spec in enumerate(sites)
        for layer, rank in enumerate(spec.ranks)
        if rank
    ]
    if count > len(places):
        raise ConfigError(f"groups={count}: there are only {len(places)} adapted matrices to tie")
    found = {spec.info.name: np.zeros(len(spec.ranks), np.int32) for spec in sites}
    for order, (_, index, layer) in enumerate(sorted(places)):
        found[sites[index].info.name][layer] = order * count // len(places)
    return found
