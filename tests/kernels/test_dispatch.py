"""Who runs: the platform, the tuned rows, the fall to XLA, and one kernel call for each device of a population."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.kernels import dispatch, target, tuning


class Spec(NamedTuple):
    name: str
    tokens: int
    rank: int
    tied: bool = False
    widths: tuple[int, ...] = (4,)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Writes tuned rows for the op "double.forward"; a device kind is what `device_kind` returns."""

    def write(kind, *rows):
        folder = tmp_path / "double" / "tuned"
        folder.mkdir(parents=True, exist_ok=True)
        full = [{"op": "double.forward", "dtype": "float32", "blocks": None} | row for row in rows]
        (folder / f"{tuning.slug(kind)}.json").write_text(json.dumps({"rows": full}))

    monkeypatch.setattr(tuning, "ROOT", tmp_path)
    tuning.rows.cache_clear()
    yield write
    tuning.rows.cache_clear()


def _row(implementation, tokens, rank, blocks=None, **more):
    spec = {"tokens": tokens, "rank": rank, "tied": False, "widths": [4]} | more
    return {"spec": spec, "implementation": implementation, "blocks": blocks}


def test_the_nearest_tuned_shape_decides_and_blocks_come_from_an_exact_one(tuned):
    tuned("TPU v9", _row("pallas_tpu", 512, 16, {"tile": 64}), _row("xla", 8, 16))
    choose = lambda *spec: tuning.choose("double.forward", "TPU v9", Spec("", *spec), "float32")  # noqa: E731
    assert choose(512, 16) == tuning.Choice("pallas_tpu", {"tile": 64})
    assert choose(300, 8) == tuning.Choice("pallas_tpu", None)
    assert choose(16, 16) == tuning.Choice("xla", None)
    assert choose(512 << 9, 16) is None
    assert choose(512, 16, True) is None
    assert choose(512, 16, False, (4, 4)) is None
    assert choose(512, 16, False, (8,)) == tuning.Choice("pallas_tpu", None)
    assert tuning.choose("double.forward", "TPU v9", Spec("", 512, 16), "bfloat16") is None
    assert tuning.choose("double.backward", "TPU v9", Spec("", 512, 16), "float32") is None
    assert tuning.choose("double.forward", "TPU v8", Spec("", 512, 16), "float32") is None


def test_device_kinds_become_file_names():
    assert tuning.slug("TPU v5 lite") == "tpu_v5_lite"
    assert tuning.slug("NVIDIA H200") == "nvidia_h200"


def test_on_cpu_the_plain_form_is_traced_and_nothing_else(tuned):
    tuned("cpu", _row("pallas_tpu", 4, 2))
    assert target.platform() == "cpu"
    jaxpr = jax.make_jaxpr(lambda x: dispatch.run("double.forward", FORMS, Spec("", 4, 2), x, dtype="float32"))(X)
    assert [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns] == ["mul"]


X = np.arange(32, dtype=np.float32).reshape(8, 4)


def _kernel(x, blocks=None):
    return jnp.sin(x)


def _cannot(x, blocks=None):
    raise NotImplementedError("4 columns are not a multiple of 128")


FORMS = {"xla": lambda x: x * 2, "pallas_tpu": _kernel}


def _on_tpu(monkeypatch):
    monkeypatch.setattr(target, "platform", lambda: "tpu")
    monkeypatch.setattr(target, "device_kind", lambda: "TPU v9")


def test_a_tuned_kernel_is_bound_to_its_platform(tuned, monkeypatch):
    """A program traced for a TPU still lowers, and runs, on the host's CPU, with the plain form."""
    tuned("TPU v9", _row("pallas_tpu", 4, 2))
    _on_tpu(monkeypatch)
    call = jax.jit(lambda x: dispatch.run("double.forward", FORMS, Spec("", 4, 2), x, dtype="float32"))
    np.testing.assert_array_equal(call(X), X * 2)
    assert "sine" in call.trace(X).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("row", "forms"),
    [
        (_row("xla", 4, 2), FORMS),
        (_row("pallas_triton", 4, 2), FORMS | {"pallas_triton": _kernel}),
        (_row("pallas_tpu", 4, 2), FORMS | {"pallas_tpu": _cannot}),
        (_row("pallas_tpu", 4, 2), {"xla": FORMS["xla"]}),
        (_row("pallas_tpu", 4, 800), FORMS),
    ],
    ids=["xla is ahead", "another platform's", "cannot", "not written", "too far"],
)
def test_otherwise_xla_runs(tuned, monkeypatch, row, forms):
    tuned("TPU v9", row)
    _on_tpu(monkeypatch)
    call = jax.jit(lambda x: dispatch.run("double.forward", forms, Spec("", 4, 1), x, dtype="float32"))
    text = call.trace(X).lower(lowering_platforms=("tpu",)).as_text()
    assert "multiply" in text
    assert "sine" not in text


def test_a_named_implementation_says_why_it_cannot():
    with pytest.raises(NotImplementedError, match="4 columns"):
        dispatch.run("double.forward", {"no": _cannot}, Spec("", 4, 2), X, dtype="float32", implementation="no")


def _mesh(shape, names):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, names)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_users_on_several_devices_get_a_kernel_call_each(shape):
    mesh, seen = _mesh(shape, ("population", "tensor")[: len(shape)]), []

    def kernel(x, w):
        seen.append(x.shape)
        return x * w

    with jax.set_mesh(mesh):
        call = jax.jit(lambda x, w: dispatch.over_population(kernel, (x, w), (True, False)))
        np.testing.assert_array_equal(call(X, np.float32(3)), X * 3)
    assert seen == [(2, 4)]


@pytest.mark.parametrize(
    ("shape", "names", "population", "message"),
    [
        ((2, 2), ("population", "tensor"), (True,), "axis 'population' only"),
        ((4,), ("tensor",), (True,), "axis 'population' only"),
        ((8,), ("population",), None, "no population axis"),
        ((3,), ("population",), (True,), r"\[8\] users do not divide over 3"),
    ],
)
def test_what_cannot_be_cut_says_so(shape, names, population, message):
    with jax.set_mesh(_mesh(shape, names)), pytest.raises(NotImplementedError, match=message):
        jax.jit(lambda x: dispatch.over_population(lambda x: x, (x,), population))(X)


def test_the_default_device_names_the_platform():
    with jax.default_device(jax.devices("cpu")[1]):
        assert (target.platform(), target.device_kind()) == ("cpu", "cpu")
    with jax.default_device("cpu"):
        assert (target.platform(), target.device_kind()) == ("cpu", "cpu")
    assert target.vmem_bytes() == target.LEAST_VMEM_BYTES
