"""The picture of a comparison: what each user's own adapter gains over the base, beside the controls."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_gains(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """PNG: for each user, bits per byte saved against the base by the own, the shared and a wrong user's adapter.

    rows: those of a report (popax.evaluation.columns.UserScores as dicts), sorted here by the own adapter's gain.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    def gain(row: Mapping[str, Any], column: str) -> float:
        return float("nan") if row[column] is None else row["base"] - row[column]

    ordered = sorted(rows, key=lambda row: gain(row, "own"), reverse=True)
    places = range(len(ordered))
    figure, axes = plt.subplots(figsize=(max(6.0, 0.2 * len(ordered)), 4.5), layout="constrained")
    axes.bar(places, [gain(row, "own") for row in ordered], color="tab:blue", label="own adapter")
    axes.plot(places, [gain(row, "shared") for row in ordered], "o", ms=3, color="tab:orange", label="shared adapter")
    axes.plot(places, [gain(row, "wrong") for row in ordered], "x", ms=4, color="tab:red", label="another user's")
    axes.axhline(0.0, color="black", lw=0.8)
    axes.set_ylabel("bits per byte saved on held-out text")
    axes.set_xticks(places, [row["user"] for row in ordered], rotation=90, fontsize=6)
    axes.set_xlim(-0.7, len(ordered) - 0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
