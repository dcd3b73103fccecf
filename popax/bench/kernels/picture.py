"""The picture of a timed report: each form's seconds over the floor's, for every op and shape."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from popax.errors import ConfigError

MOST_SHAPES = 18


def draw(rows: Sequence[Mapping[str, Any]], path: Path, most: int = MOST_SHAPES) -> None:
    """PNG: for the first `most` of the rows' shapes a bar a form, on a logarithmic scale; 1 is the floor.

    Raises ConfigError where no row was timed.
    """
    timed = [row for row in rows if "ratio" in row]
    if not timed:
        raise ConfigError("the report has no timed row: make one with `popax bench kernels --timed --json PATH`")
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((row["op"], row["spec"]) for row in timed))[:most]
    shown = [row for row in timed if (row["op"], row["spec"]) in shapes]
    forms = list(dict.fromkeys(row["implementation"] for row in shown))
    ratios = {(row["op"], row["spec"], row["implementation"]): row["ratio"] for row in shown}
    height = 0.8 / len(forms)
    figure, axes = plt.subplots(figsize=(9.0, 1.5 + 0.1 * len(shapes) * (len(forms) + 1)), layout="constrained")
    for at, form in enumerate(forms):
        places = [place for place, shape in enumerate(shapes) if (*shape, form) in ratios]
        values = [ratios[(*shapes[place], form)] for place in places]
        offset = (at - (len(forms) - 1) / 2) * height
        axes.barh([place + offset for place in places], values, height, label=form)
    axes.axvline(1.0, color="black", lw=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("seconds over the floor's: bytes at the copy's bandwidth, or operations at the matmul's rate")
    axes.set_yticks(range(len(shapes)), [f"{op}\n{spec}" for op, spec in shapes], fontsize=6)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
