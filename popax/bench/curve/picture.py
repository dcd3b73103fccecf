"""The picture of a curve: bytes a user owns, and what they are worth."""

import itertools
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

    figure, axes = plt.subplots(figsize=(10, 5.2), layout="constrained")
    colours = plt.get_cmap("tab20")(np.arange(20))
    largest_first = sorted(chosen(rows).items(), key=lambda item: -item[1][0]["bytes"])
    for (method, same), colour in zip(largest_first, itertools.cycle(colours), strict=False):
        gains = np.array([row["gain"] for row in same])
        size, mean = same[0]["bytes"], gains.mean()
        reach = [[mean - gains.min()], [gains.max() - mean]]
        label = f"{method}  {mean:+.3f}"
        axes.errorbar([size], [mean], yerr=reach, marker="o", capsize=3, color=colour, linestyle="none", label=label)
        axes.plot([size], [-np.mean([row["forgetting"] for row in same])], "x", color=colour)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="bytes a user owns", ylabel="bits per byte saved on held-out text")
    axes.set_title("dots: a user's own adapter, over seeds; crosses: another user's")
    figure.legend(loc="outside right upper", fontsize=8, title="largest first")
    figure.savefig(path, dpi=110)
    plt.close(figure)
