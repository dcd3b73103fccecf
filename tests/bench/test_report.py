"""Reports have the shape that scripts rely on (design.md section 9) and are whole or absent."""

import json
import math
import os

import jax
import numpy as np
import pytest

from popax.adapters.base import AdapterConfig
from popax.bench import report


def test_a_report_has_the_agreed_keys(tmp_path):
    path = tmp_path / "new" / "report.json"
    figures = {"ratio": np.float32(1.5), "users": 64, "gap": math.nan}
    config = {"adapter": AdapterConfig(rank=4), "path": path, "function": math.sqrt}
    written = report.write_report(path, name="demo", config=config, figures=figures, rows=[{"loss": np.ones(2)}])
    read = json.loads(path.read_text())
    assert read == written == report.read_report(path)
    assert list(read) == ["name", "commit", "versions", "device", "config", "figures", "rows"]
    assert read["figures"] == {"ratio": 1.5, "users": 64, "gap": None}
    assert read["rows"] == [{"loss": [1.0, 1.0]}]
    assert read["config"]["adapter"]["rank"] == 4
    assert read["config"]["function"] == "sqrt"
    assert read["versions"]["jax"] == jax.__version__
    assert read["device"]["count"] == jax.device_count()
    assert os.listdir(path.parent) == ["report.json"]


def test_what_json_cannot_say_leaves_no_file(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        report.write_report(path, name="demo", config={}, figures={})
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["report.json"]


def test_other_json_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="lacks commit, config"):
        report.read_report(path)
