"""`popax train`: revisions, the table and its report; stopped and continued; what is refused, and how."""

import json
import shutil
import signal

import pytest

from popax.cli.main import main
from popax.store.catalog import Catalog
from popax.training.metrics import MetricsWriter, read_metrics
from tests.shared_data import SHARED, needs_shared


def digests(catalog: str) -> dict[str, list[str]]:
    opened = Catalog.open(catalog, read_only=True)
    return {record.user: [m.digest for m in opened.history(record.user)] for record in opened.list()}


def test_every_selected_user_has_a_revision_and_a_row(world):
    report = json.loads(world.report.read_text())
    assert sorted(digests(world.catalog)) == ["u00", "u01", "u02", "u03", "u04"]
    assert report["figures"]["users_trained"] == 5
    assert report["figures"]["users"] == 5
    assert {"own_beats_base", "own_beats_wrong", "own_beats_shared", "seconds"} <= set(report["figures"])
    assert [row["user"] for row in report["rows"]] == ["u00", "u01", "u02", "u03", "u04"]
    assert all(row[column] > 0 for row in report["rows"] for column in ("base", "shared", "own", "wrong"))
    assert report["config"]["train"]["adapter"]["rank"] == 2


def test_the_run_keeps_its_configuration_and_its_metrics(world):
    operative = (world.run / "operative.gin").read_text()
    assert "EarlyStop.every = 3" in operative
    assert "adamw.b1 = 0.9" in operative
    records = read_metrics(world.run)
    assert records[-1]["users_done"] == 5
    assert list((world.run / "tensorboard").iterdir())


def test_the_same_command_again_changes_nothing(world, capsys):
    before = digests(world.catalog)
    assert main(world.train(world.run)) == 0
    assert digests(world.catalog) == before
    assert "0 users trained in 0 iterations, 5 up to date" in capsys.readouterr().out


def test_ctrl_c_says_how_to_go_on_and_the_run_ends_as_if_never_stopped(world, tmp_path, capsys, monkeypatch):
    write = MetricsWriter.write

    def interrupt_once(self, step, values):
        write(self, step, values)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MetricsWriter, "write", interrupt_once)
    assert main(world.train(tmp_path, "--no_table")) == 130
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(MetricsWriter, "write", write)
    assert main(world.train(tmp_path, "--no_table")) == 0
    assert digests(str(tmp_path / "catalog")) == digests(world.catalog)
    steps = [record["step"] for record in read_metrics(tmp_path)]
    assert steps == sorted(set(steps))


def test_only_users_with_new_data_are_trained_again_unless_everyone(world, tmp_path, capsys):
    catalog = str(tmp_path / "catalog")
    shutil.copytree(world.catalog, catalog)
    assert main(world.train(tmp_path / "again", "--catalog", catalog, "--no_table")) == 0
    assert "0 users trained in 0 iterations, 5 up to date" in capsys.readouterr().out
    assert main(world.train(tmp_path / "all", "--catalog", catalog, "--no_table", "--everyone")) == 0
    assert {len(history) for history in digests(catalog).values()} == {2}


def test_a_dataset_that_was_built_is_used_again(world, tmp_path):
    arguments = world.train(tmp_path, "--no_table")
    arguments[arguments.index(world.data)] = str(world.run / "data")
    assert main(arguments) == 0
    assert not (tmp_path / "data").exists()
    assert digests(str(tmp_path / "catalog")) == digests(world.catalog)


def test_other_settings_in_the_same_directory_are_refused(world, capsys):
    assert main(world.train(world.run, "--gin_param", "adamw.b1=0.5")) == 2
    assert "other settings (optimizer)" in capsys.readouterr().err


REFUSED = [
    (["--gin_param", r"AdapterConfig.targets=('layers\\.nose\\..*',)"], "matches no site"),
    (["--gin_param", "AdapterConfig.rnk=2"], "its keys are"),
    (["--gin_param", "PipelineConfig.seq_len=1000"], "max_seq_len=64"),
    (["--users_with_at_least", "99"], "at least 99 examples"),
    (["--tokenizer", "nowhere"], "no tokenizer at nowhere"),
    (["--base", "nowhere"], "no base to load"),
    (["--data", "nowhere.jsonl"], "no data at nowhere.jsonl"),
]


@pytest.mark.parametrize(("more", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_wrong_is_one_line_and_nothing_is_trained(world, tmp_path, capsys, more, words):
    assert main(world.train(tmp_path / "run", *more)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_key_without_value_is_named(world, tmp_path, capsys):
    empty = tmp_path / "empty.gin"
    empty.write_text("")
    arguments = world.train(tmp_path / "run")
    arguments[arguments.index(world.users)] = str(empty)
    assert main(arguments) == 2
    assert "PipelineConfig.seq_len" in capsys.readouterr().err


def test_a_line_without_user_is_named(world, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"user": "a", "text": "x"}\n{"text": "whose?"}\n')
    assert main(world.train(tmp_path / "run", "--data", str(broken))) == 2
    assert f"{broken}:2" in capsys.readouterr().err
    assert not (tmp_path / "run" / "data" / "users").exists()


def test_a_base_without_tokenizer_is_named(world, tmp_path, capsys):
    shutil.copytree(world.base, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    assert main(world.train(tmp_path / "run", "--base", str(tmp_path / "base"))) == 2
    assert "no tokenizer at" in capsys.readouterr().err


@needs_shared("tinystories_656k_hf")
def test_a_truncated_safetensors_file_is_named(world, tmp_path, capsys):
    shutil.copytree(SHARED / "tinystories_656k_hf", tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert main(world.train(tmp_path / "run", "--base", str(tmp_path / "base"))) == 2
    error = capsys.readouterr().err
    assert "model.safetensors" in error
    assert error.count("\n") == 1


def test_users_of_another_base_are_refused(world, tmp_path, capsys):
    assert main(world.pretrain(tmp_path / "other", "--gin_param", "PretrainConfig.steps=3")) == 0
    base = str(tmp_path / "other" / "base")
    catalog = str(tmp_path / "catalog")
    shutil.copytree(world.catalog, catalog)
    assert main(world.train(tmp_path / "run", "--catalog", catalog, "--base", base)) == 2
    error = capsys.readouterr().err
    assert "all 5 users were set aside" in error
    assert "was made for the base" in error


def test_a_revision_of_another_configuration_is_not_continued(world, tmp_path, capsys):
    catalog = str(tmp_path / "catalog")
    shutil.copytree(world.catalog, catalog)
    assert main(world.train(tmp_path / "run", "--catalog", catalog, "--gin_param", "AdapterConfig.alpha=4.0")) == 2
    assert "a user continues with the configuration they have" in capsys.readouterr().err
    assert digests(catalog) == digests(world.catalog)


COHORTS = r"""
TrainConfig.cohorts = (@first/CohortRule(), @second/CohortRule(), @rest/CohortRule())
first/CohortRule.users = 'u0[01]'
first/CohortRule.adapter = @AdapterConfig()
second/CohortRule.users = 'u0[0-3]'
second/CohortRule.adapter = @second/AdapterConfig()
second/CohortRule.learning_rate = 1e-2
second/AdapterConfig.method = 'lora_xs'
rest/CohortRule.adapter = None
"""


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("cohorts") / "cohorts.gin"
    path.write_text(COHORTS)
    return str(path)


def test_cohorts_of_one_run_are_each_what_it_is_alone(world, cohorts, tmp_path, capsys):
    """Two methods, the first rule that matches wins, and users of the base alone among them."""
    report = tmp_path / "report.json"
    assert main([*world.train(tmp_path / "run", "--gin_file", cohorts), "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "lora of rank 2: 2 users trained" in out
    assert "lora_xs of rank 2: 2 users trained" in out
    assert "1 users stay with the base alone" in out
    catalog = Catalog.open(str(tmp_path / "run" / "catalog"), read_only=True)
    methods = {record.user: catalog.history(record.user)[-1].config["method"] for record in catalog.list()}
    assert methods == {"u00": "lora", "u01": "lora", "u02": "lora_xs", "u03": "lora_xs"}
    whole, mixed = digests(world.catalog), digests(str(tmp_path / "run" / "catalog"))
    assert [mixed[user] for user in ("u00", "u01")] == [whole[user] for user in ("u00", "u01")]
    alone = ["--gin_param", "AdapterConfig.method = 'lora_xs'", "--gin_param", "TrainConfig.learning_rate = 1e-2"]
    assert main(world.train(tmp_path / "alone", "--no_table", *alone)) == 0
    other = digests(str(tmp_path / "alone" / "catalog"))
    assert [mixed[user] for user in ("u02", "u03")] == [other[user] for user in ("u02", "u03")]
    figures = json.loads(report.read_text())["figures"]
    assert (figures["users_trained"], figures["cohorts"], figures["users_of_the_base_alone"]) == (4, 2, 1)
    assert figures["users"] == 4


def test_a_stopped_run_of_cohorts_goes_on_where_it_was(world, cohorts, tmp_path, capsys, monkeypatch):
    write = MetricsWriter.write

    def interrupt_once(self, step, values):
        write(self, step, values)
        signal.raise_signal(signal.SIGINT)

    command = world.train(tmp_path, "--no_table", "--gin_file", cohorts)
    stops = 0
    monkeypatch.setattr(MetricsWriter, "write", interrupt_once)
    while (code := main(command)) == 130:
        stops += 1
    monkeypatch.setattr(MetricsWriter, "write", write)
    assert (code, stops > 1) == (0, True)
    assert "lora_xs of rank 2: 2 users trained" in capsys.readouterr().out
    assert {user: len(found) for user, found in digests(str(tmp_path / "catalog")).items()} == dict.fromkeys(
        ("u00", "u01", "u02", "u03"), 1
    )


def test_every_cohort_is_checked_before_the_first_is_trained(world, cohorts, tmp_path, capsys):
    bounds = ["--gin_param", "TrainConfig.norm_budget = 1.0", "--gin_param", "TrainConfig.norm_kind = 'spectral'"]
    method = [
        "--gin_param",
        "second/AdapterConfig.method = 'ia3'",
        "--gin_param",
        "second/AdapterConfig.targets = ('.*',)",
    ]
    assert main(world.train(tmp_path, "--no_table", "--gin_file", cohorts, *bounds, *method)) == 2
    assert "method='ia3' has no spectral norm" in capsys.readouterr().err
    assert digests(str(tmp_path / "catalog")) == {}


def test_a_user_of_no_cohort_is_named(world, cohorts, tmp_path, capsys):
    more = ["--gin_file", cohorts, "--gin_param", "rest/CohortRule.users = 'x'"]
    assert main(world.train(tmp_path, "--no_table", *more)) == 2
    assert "1 users match no rule of TrainConfig.cohorts ('u04', ...)" in capsys.readouterr().err
    assert main(world.train(tmp_path, "--gin_file", cohorts, "--gin_param", "rest/CohortRule.users = '('")) == 2
    assert "is not a regular expression" in capsys.readouterr().err
