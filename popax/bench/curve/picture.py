"""The picture of a curve: bytes a user owns, and what they are worth."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from popax.bench.curve.choice import choices


def draw_curve(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """A PNG: each method's gain, a bar over its seeds; the cross is what another user's adapter loses."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5.2), layout="constrained")
    largest_first = sorted(choices(rows).items(), key=lambda item: -item[1].bytes)
    colours = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(largest_first)))
    for (method, choice), colour in zip(largest_first, colours, strict=True):
        gains = choice.gain_S
        size, mean = choice.bytes, gains.mean()
        reach = [[mean - gains.min()], [gains.max() - mean]]
        label = f"{method}  {mean:+.3f}"
        axes.errorbar([size], [mean], yerr=reach, marker="o", capsize=3, color=colour, linestyle="none", label=label)
        axes.plot([size], [-choice.lost_S.mean()], "x", color=colour)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="bytes a user owns", ylabel="bits per byte saved on held-out text")
    axes.set_title("dots: a user's own adapter, over seeds; crosses: another user's")
    figure.legend(loc="outside right upper", fontsize=8, title="largest first")
    figure.savefig(path, dpi=110)
    plt.close(figure)
