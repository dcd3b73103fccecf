"""The JSON that every measuring command writes (design.md section 9), from which documents and pictures are made."""

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import popax
from popax.atomic import write_text
from popax.version import commit

VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore")


def write_report(
    path: str | os.PathLike[str],
    *,
    name: str,
    config: Mapping[str, Any],
    figures: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write {"name", "commit", "versions", "device", "config", "figures", "rows"}; returns it.

    config may hold dataclasses; figures are numbers that scripts rely on; rows are the table behind them. Numbers
    that are not finite become null. The file is whole or absent: it is renamed into place.
    """
    report = {
        "name": name,
        "commit": commit(),
        "versions": versions(),
        "device": device(),
        "config": _plain(config),
        "figures": _plain(figures),
        "rows": _plain(rows),
    }
    write_text(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
    return report


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_report` wrote. Raises OSError, or ValueError where the file is not one of its reports."""
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    absent = {"name", "commit", "versions", "device", "config", "figures", "rows"} - set(report)
    if absent:
        raise ValueError(f"{os.fspath(path)} is not a popax report: it lacks {', '.join(sorted(absent))}")
    return report


def versions() -> dict[str, str]:
    """Python's, popax's and the numerical libraries' versions."""
    found = {"python": platform.python_version(), "popax": popax.__version__}
    for package in VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def device() -> dict[str, Any]:
    """{"platform", "kind", "count"} of the devices that jax uses, and the host's processor count."""
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "host_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _plain(value: Any) -> Any:
    """Values that JSON has words for; anything else by its own name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | jax.Array | np.generic):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, functools.partial):
        return {"function": _plain(value.func), **_plain(value.keywords)}
    return getattr(value, "__qualname__", None) or str(value)
