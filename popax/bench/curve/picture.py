"""The picture of a curve: bytes a user owns, and what they are worth."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from popax.bench.curve.run import chosen


def draw_curve(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """A PNG: each method at its chosen rate, a bar over its seeds; the cross is what another user's adapter loses."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    for method, same in chosen(rows).items():
        gains = np.array([row["gain"] for row in same])
        size, mean = same[0]["bytes"], gains.mean()
        reach = [[mean - gains.min()], [gains.max() - mean]]
        drawn = axes.errorbar([size], [mean], yerr=reach, marker="o", capsize=3)
        axes.plot([size], [-np.mean([row["forgetting"] for row in same])], "x", color=drawn[0].get_color(), alpha=0.6)
        axes.annotate(method, (size, mean), xytext=(6, 5), textcoords="offset points", fontsize=8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="bytes a user owns", ylabel="bits per byte saved on held-out text")
    axes.set_title("dots: a user's own adapter, over seeds; crosses: another user's")
    figure.savefig(path, dpi=110)
    plt.close(figure)
