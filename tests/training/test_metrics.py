"""Metrics reach both files, survive a kill, and do not repeat a step after a resume."""

import json
import math
import struct

import numpy as np
from tensorboardX.proto.event_pb2 import Event

from popax.training.metrics import MetricsWriter, read_metrics


def test_one_line_a_step_flushed_at_once(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(1, {"loss": np.float32(2.5), "users": 3, "phase": "train"})
        (record,) = read_metrics(tmp_path)  # before close
    assert (record["step"], record["loss"], record["users"], record["phase"]) == (1, 2.5, 3.0, "train")
    assert record["time"] > 1e9


def test_what_is_not_finite_is_null(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(1, {"loss": math.nan, "norm": math.inf})
    (record,) = read_metrics(tmp_path)
    assert record["loss"] is None
    assert record["norm"] is None


def test_a_resumed_run_appends_and_drops_what_it_will_repeat(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        for step in range(1, 6):
            metrics.write(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 6, "lo')  # killed here
    with MetricsWriter(tmp_path, resume_step=3) as metrics:
        metrics.write(4, {"loss": 40})
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_opening_again_keeps_every_whole_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 9}) + '\n{"st')
    with MetricsWriter(tmp_path):
        pass
    assert read_metrics(tmp_path) == [{"step": 9}]


def tfrecords(path):
    """The records of a TFRecord file: uint64 length, its crc, the bytes, their crc."""
    raw, at = path.read_bytes(), 0
    while at < len(raw):
        (length,) = struct.unpack_from("<Q", raw, at)
        yield raw[at + 12 : at + 12 + length]
        at += 16 + length


def test_tensorboard_events_hold_the_same_numbers(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(7, {"loss": 1.5})
    (path,) = (tmp_path / "tensorboard").iterdir()
    events = [Event.FromString(record) for record in tfrecords(path)]
    scalars = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert scalars == [(7, "loss", 1.5)]
