"""gin at the door: bindings reach library classes, mistakes name the key and the fix, the run's values are kept."""

import argparse
import os
import subprocess
import sys

import pytest

from popax.adapters.base import AdapterConfig, TargetRule
from popax.cli import gin_door
from popax.cli.gin_door import GinDoor, find_gin_file
from popax.errors import ConfigError
from popax.modeling.config import ModelConfig
from popax.population.optimizer import adamw, sgd
from popax.training.config import TrainConfig


def test_bindings_reach_the_library_class_itself():
    params = ["AdapterConfig.rank=4", "AdapterConfig.targets=(r'layers\\..*', @head/TargetRule())"]
    door = GinDoor([], [*params, "head/TargetRule.pattern='lm_head'", "head/TargetRule.rank=2"])
    built = door.build(AdapterConfig, alpha=8.0)
    assert built == AdapterConfig(rank=4, alpha=8.0, targets=(r"layers\..*", TargetRule(pattern="lm_head", rank=2)))
    assert type(built) is AdapterConfig
    assert AdapterConfig().rank == 8  # the library's own class is untouched


def test_a_later_file_wins_over_an_earlier_and_a_param_over_both(tmp_path):
    (tmp_path / "a.gin").write_text("AdapterConfig.rank = 1\nAdapterConfig.alpha = 1.0\nAdapterConfig.dropout = 0.1\n")
    (tmp_path / "b.gin").write_text(f"include '{tmp_path}/a.gin'\nAdapterConfig.rank = 2\nAdapterConfig.alpha = 2.0\n")
    door = GinDoor([str(tmp_path / "a.gin"), str(tmp_path / "b.gin")], ["AdapterConfig.rank = 3"])
    built = door.build(AdapterConfig)
    assert (built.rank, built.alpha, built.dropout) == (3, 2.0, 0.1)


@pytest.mark.parametrize("name", [gin_door.BENCH_MODEL, gin_door.BENCH_SERVE])
def test_a_benchmark_has_a_model_without_a_config_file(name):
    def opened(*params):
        return gin_door.open_door(argparse.Namespace(gin_file=[], gin_param=list(params)), model=name)

    model = opened("ModelConfig.num_layers = 3").build(ModelConfig)
    assert (model.num_layers, model.vocab_size > 0) == (3, True)
    # Who names a model has that one alone: nothing of the other one is mixed into it.
    with pytest.raises(ConfigError, match=r"ModelConfig\.embed_dim"):
        opened("ModelConfig.vocab_size = 64").build(ModelConfig)


def test_old_keys_are_read_under_their_new_names(tmp_path, capsys):
    (tmp_path / "inner.gin").write_text("TrainConfig.keep_optimizer = True\n")
    (tmp_path / "outer.gin").write_text(f"include '{tmp_path}/inner.gin'\nTrainConfig.steps = 3\n")
    assert GinDoor([str(tmp_path / "outer.gin")], []).build(TrainConfig).save_optimizer_state
    assert capsys.readouterr().err == ("gin: TrainConfig.keep_optimizer is TrainConfig.save_optimizer_state now\n")
    assert GinDoor([], ["TrainConfig.keep_optimizer = True"]).build(TrainConfig).save_optimizer_state


def test_opening_a_door_forgets_the_one_before():
    GinDoor([], ["AdapterConfig.rank=4"])
    assert GinDoor([], []).build(AdapterConfig).rank == 8


def test_factories_take_bindings_too():
    assert GinDoor([], ["adamw.b1=0.5"]).build(adamw) == adamw(b1=0.5)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (["AdapterConfig.rnk=4"], ["'rnk'", "its keys are method, rank, alpha"]),
        (["AdaptrConfig.rank=4"], ["'AdaptrConfig'", "known are", "AdapterConfig"]),
        (["AdapterConfig.targets=(@Missing(),)"], ["@Missing()", "known are"]),
        (["AdapterConfig.rank=="], ["not gin syntax", "AdapterConfig.rank=="]),
        (["AdapterConfig.rank=0"], ["rank=0: a rank is at least 1"]),
        (["AdapterConfig.rank='four'"], ["AdapterConfig"]),
        (["AdapterConfig.targets=(@TargetRule(),)"], ["TargetRule.pattern has no value", "--gin_param"]),
    ],
)
def test_mistakes_name_the_key_and_the_fix(params, words):
    with pytest.raises(ConfigError) as caught:
        GinDoor([], params).build(AdapterConfig)
    message = " ".join(str(caught.value).split())
    assert all(word in message for word in words), message


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    (tmp_path / "bad.gin").write_text("AdapterConfig.rank = 4\nAdapterConfig.rnk = 4\n")
    with pytest.raises(ConfigError, match=r"bad\.gin.* line 2"):
        GinDoor([str(tmp_path / "bad.gin")], [])


def test_what_gin_does_not_know_is_named():
    with pytest.raises(ConfigError, match="dict cannot be set by gin; add it to"):
        GinDoor([], []).build(dict)


def test_the_operative_config_gives_the_same_run_again(tmp_path):
    first = GinDoor([], ["AdapterConfig.rank=4", "sgd.momentum=0.9"])
    built = first.build(AdapterConfig), first.build(sgd)
    path = first.save(tmp_path / "run")
    text = path.read_text()
    assert "AdapterConfig.rank = 4" in text
    assert "AdapterConfig.alpha = 16.0" in text  # a default, kept against the day it changes
    assert os.listdir(path.parent) == ["operative.gin"]
    second = GinDoor([str(path)], [])
    assert (second.build(AdapterConfig), second.build(sgd)) == built


def test_files_are_found_on_disk_and_inside_the_package(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"'no/such\.gin' is neither a file nor one of popax's"):
        find_gin_file("no/such.gin")
    package = tmp_path / "package"
    (package / "configs" / "models").mkdir(parents=True)
    (package / "configs" / "models" / "tiny.gin").write_text("AdapterConfig.rank = 5\n")
    monkeypatch.setattr(gin_door, "_config_folders", lambda: (package, package / "configs"))
    found = str(package / "configs" / "models" / "tiny.gin")
    assert find_gin_file("configs/models/tiny.gin") == find_gin_file("models/tiny.gin") == found
    (tmp_path / "run.gin").write_text("include 'configs/models/tiny.gin'\n")
    assert GinDoor([str(tmp_path / "run.gin")], []).build(AdapterConfig).rank == 5


def test_every_config_of_the_package_parses():
    for folder in gin_door._config_folders()[1:]:
        for path in sorted(folder.rglob("*.gin")):
            GinDoor([str(path)], [])


def test_every_configurable_exists():
    GinDoor([], [])


def test_the_library_does_not_import_gin():
    code = (
        "import sys, popax.adapters.cohort, popax.population.step, popax.training.config; "
        "assert 'gin' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
