"""The picture of a plan: what a chip's memory holds in each step."""

from collections.abc import Mapping
from pathlib import Path


def draw_memory(steps: Mapping[str, Mapping[str, int]], limit_bytes: int, title: str, path: Path) -> None:
    """PNG: a stacked bar for each step, {step: {kind: bytes of one chip}}, under the line of the chip's limit."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    visible = limit_bytes / 500
    kinds = list(dict.fromkeys(kind for held in steps.values() for kind, size in held.items() if size > visible))
    figure, axes = plt.subplots(figsize=(max(4.5, 1.6 * len(steps) + 2.5), 4.5), layout="constrained")
    floor = [0.0] * len(steps)
    for kind in kinds:
        heights = [held.get(kind, 0) / 1e9 for held in steps.values()]
        axes.bar(list(steps), heights, bottom=floor, width=0.6, label=kind)
        floor = [below + height for below, height in zip(floor, heights, strict=True)]
    axes.axhline(limit_bytes / 1e9, color="black", ls="--", lw=1.0, label="limit")
    axes.set_ylabel("GB of HBM a chip")
    axes.set_title(title, fontsize=9)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
