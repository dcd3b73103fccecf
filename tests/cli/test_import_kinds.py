"""A DoRA, gains or a prompt, extracted to a PEFT directory and imported again: the base is read for what differs."""

import jax
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.cli.main import main
from popax.modeling.base import save_base
from popax.store.catalog import Catalog
from tests.serving.world import World

KINDS = {
    "dora": AdapterConfig(method="dora", rank=2),
    "ia3": AdapterConfig(method="ia3"),
    "prompt": AdapterConfig(method="prompt", rank=3),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    world = World.make(folder / "catalog", users=0)
    for name, config in KINDS.items():
        world.commit(name, config, np.random.default_rng(1))
    save_base(folder / "base", world.base)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_extracted_is_imported(place, kind):
    catalog, directory = str(place / "catalog"), str(place / kind)
    assert main(["extract", catalog, kind, directory, "--base_name", str(place / "base")]) == 0
    assert main(["import", catalog, f"{kind}-again", directory, "--base", str(place / "base")]) == 0
    first, back = (Catalog.open(catalog, read_only=True).load(user)[0] for user in (kind, f"{kind}-again"))
    for adapter in (first, back):
        for leaves in adapter.values():
            leaves.pop("n", None)  # DoRA's own sizes follow from the rest; these were drawn at random
    jax.tree.map(lambda own, other: np.testing.assert_allclose(other, own, rtol=1e-5, atol=1e-6), first, back)
