"""Meshes by name, and what the compiler is told of them."""

import jax
import pytest

from popax.errors import ConfigError
from popax.sharding import ShardingRules, make_mesh, training_options


def test_rows_lie_over_context():
    mesh = make_mesh("population=2,context=4")
    assert ShardingRules().spec(("population", None, "sequence"), mesh) == jax.P("population", None, "context")
    with pytest.raises(ConfigError, match=r"AXIS=SIZE.*context, expert, fsdp, population, tensor"):
        make_mesh("sequence=8")


def test_hosts_are_told_nothing():
    assert training_options(make_mesh(None)) is None
