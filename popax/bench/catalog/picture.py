"""The picture of a catalog's benchmark: each figure beside what was asked for, and three ways of storing."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

# (figure, its bound, whether more is better, how it is written)
BOUNDS = (
    ("revisions_per_s", 10_000, True, "built: {:,.0f} revisions/s"),
    ("open_s", 1, False, "opened: {:.3f} s"),
    ("load_p50_ms", 0.6, False, "one load, median: {:.2f} ms"),
    ("load_p99_ms", 5, False, "one load, 99%: {:.2f} ms"),
    ("batched_1024_ms", 40, False, "1,024 loads in a batch: {:.1f} ms"),
    ("large_mb_per_s", 500, True, "large rows: {:,.0f} MB/s"),
    ("history_ms", 2, False, "a history of 20: {:.2f} ms"),
    ("extract_ms", 50, False, "one user extracted: {:.1f} ms"),
    ("overhead_bytes_per_user", 1024, False, "beside the row: {:.0f} bytes a user"),
    ("peak_bytes", 1e9, False, "memory: {:,.0f} bytes"),
)


def draw_catalog(figures: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """A PNG: on the left how much of its bound each figure takes (shorter is better, 1 is the bound), on the right the
    time to load all of 4, 16, 256 users in each way of storing."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shown = [bound for bound in BOUNDS if figures.get(bound[0]) is not None]
    taken = [bound / figures[name] if more else figures[name] / bound for name, bound, more, _ in shown]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    left.barh(range(len(shown)), taken, color=["#3a7d44" if part <= 1 else "#b5473c" for part in taken])
    left.axvline(1, color="black", linewidth=1)
    left.set_yticks(range(len(shown)), [text.format(figures[name]) for name, _, _, text in shown])
    left.invert_yaxis()
    left.set_xlabel("share of the bound")
    left.set_title(f"{figures['users']:,} users of {figures['row_bytes']:,} bytes, {figures['large_users']:,} large")
    for way in dict.fromkeys(row["stored as"] for row in rows):
        of_it = [row for row in rows if row["stored as"] == way]
        right.plot([row["users"] for row in of_it], [row["load_ms"] for row in of_it], marker="o", label=way)
    right.set(xscale="log", yscale="log", xlabel="users", ylabel="milliseconds", title="loading all of them")
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
