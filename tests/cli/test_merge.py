"""`popax merge`: a base that says by itself what base and adapters said."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind
from popax.adapters.base import AdapterConfig
from popax.adapters.cohort import Cohort
from popax.cli.main import main
from popax.modeling.base import load_base, new_base, save_base
from popax.store.catalog import Catalog
from popax.store.layout import RowLayout

TOKENS = jnp.asarray([[5, 60, 70, 3, 99, 41]])


def adapted(world, user):
    """Logits of the base with this user's adapter beside it."""
    base, catalog = load_base(world.base), Catalog.open(world.catalog)
    adapter, manifest = catalog.load(user)
    stored = catalog.cohort_of(manifest)
    cohort = Cohort(stored.config, tuple(stored.specs.values()))
    return base.model(base.params, TOKENS, adapt=bind(cohort, adapter, catalog.shared(stored)))


def test_a_merged_base_is_base_and_adapter(world, tmp_path, capsys):
    out, record = tmp_path / "merged", tmp_path / "merged.json"
    arguments = ["merge", world.catalog, "u00", "--base", world.base, "--out", str(out), "--json", str(record)]
    assert main(arguments) == 0
    assert "'u00'@1 in its weights" in capsys.readouterr().out
    merged = load_base(out)
    said = json.loads(record.read_text())
    assert said["digest"] == merged.digest != load_base(world.base).digest
    np.testing.assert_allclose(merged.model(merged.params, TOKENS), adapted(world, "u00"), rtol=1e-4, atol=1e-4)
    assert main([*arguments[:-2]]) == 2  # never over another base
    assert "exists already" in capsys.readouterr().err
    # Its own tokenizer is beside it: it generates without anything else.
    assert main(["generate", "--base", str(out), "--prompt", "ab", "--max_new_tokens", "3"]) == 0


def test_a_sum_is_merged_exactly(world, tmp_path):
    both, first = tmp_path / "both", tmp_path / "first"
    assert main(["merge", world.catalog, "0.5*u00", "2*u01", "--base", world.base, "--out", str(both)]) == 0
    assert main(["merge", world.catalog, "0.5*u00", "--base", world.base, "--out", str(first)]) == 0
    base, sums = load_base(world.base), [load_base(path).params for path in (both, first)]
    catalog = Catalog.open(world.catalog)
    adapter, manifest = catalog.load("u01")
    stored = catalog.cohort_of(manifest)
    cohort = Cohort(stored.config, tuple(stored.specs.values()))
    for site in cohort.specs:
        own, _ = cohort.merge(site, base.model.site_weight(base.params, site), adapter, {})
        change = np.asarray(own - base.model.site_weight(base.params, site))
        sum_less_first = base.model.site_weight(sums[0], site) - base.model.site_weight(sums[1], site)
        np.testing.assert_allclose(sum_less_first, 2 * change, rtol=1e-4, atol=1e-6)


def test_another_bases_adapter_is_refused(world, tmp_path, capsys):
    base = load_base(world.base)
    params = {**base.params, "final_norm": {"scale": base.params["final_norm"]["scale"] + 1}}
    save_base(tmp_path / "other", new_base(base.model, params, source="another"))
    arguments = ["merge", world.catalog, "u00", "--base", str(tmp_path / "other"), "--tokenizer", "byte"]
    assert main([*arguments, "--out", str(tmp_path / "none")]) == 2
    assert "was made for the base" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("terms", "words"), [(["base"], "the base is no adapter"), (["nobody"], "nobody")])
def test_bad_input_is_one_line(world, tmp_path, capsys, terms, words):
    assert main(["merge", world.catalog, *terms, "--base", world.base, "--out", str(tmp_path / "x")]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "targets", "words"),
    [("prompt", "embed", "changes no weight"), ("bias", r"layers\.attn\.q_proj", "no place")],
)
def test_what_no_weight_holds_is_refused(world, tmp_path, capsys, method, targets, words):
    base, catalog = load_base(world.base), Catalog.open(tmp_path / "catalog", create=True)
    cohort = Cohort.of(AdapterConfig(method=method, rank=2, targets=targets), base.model.sites())
    shared = cohort.shared(*base.model.site_arrays(base.params))
    layout = RowLayout.of(cohort.abstract())
    stored = catalog.cohort(cohort.config, cohort.specs, base.digest, layout, shared or None)
    catalog.commit(stored, "ada", jax.tree.map(np.asarray, cohort.init(jax.random.key(0))))
    arguments = ["merge", str(tmp_path / "catalog"), "ada", "--base", world.base, "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_that_would_overflow_are_not_written(world, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["merge", world.catalog, "1e39*u00", "--base", world.base, "--out", str(out)]) == 2
    assert "would hold what is not a finite number in float32" in capsys.readouterr().err
    assert not out.exists()
