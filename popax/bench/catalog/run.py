"""`popax bench catalog` from end to end."""

import concurrent.futures
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from popax.bench.catalog import measure
from popax.bench.catalog.config import BenchCatalogConfig
from popax.bench.catalog.layouts import layouts
from popax.bench.catalog.measure import Figures
from popax.bench.host_memory import peak_resident_bytes, share_arenas
from popax.modeling.config import ModelConfig


def bench_catalog(
    model: ModelConfig, config: BenchCatalogConfig, *, place: Path | None = None
) -> tuple[Figures, list[dict[str, Any]]]:
    """(figures, a row for each way of storing); progress goes to stderr. place: a directory where the catalog is kept;
    an interrupted build goes on there. Without it everything is temporary. Raises CatalogError where the audit finds
    anything wrong.

    Who builds, who serves and who audits are processes of their own, as elsewhere: none has another's garbage, and
    `peak_bytes` is the largest of theirs.
    """
    with tempfile.TemporaryDirectory(prefix="popax-bench-catalog-") as folder:
        scratch = Path(folder)
        home = place or scratch / "catalog"
        figures = _in_a_process(measure.build, home, model, config)
        print("built; loading", file=sys.stderr, flush=True)
        for phase, args in (
            (measure.open_and_load, (home, config)),
            (measure.load_large, (home, config)),
            (measure.one_history, (home, config)),
            (measure.extract_one, (home, config, scratch)),
            (measure.audit, (home, config)),
        ):
            found = _in_a_process(phase, *args)
            figures |= found | {"peak_bytes": max(figures["peak_bytes"], found["peak_bytes"])}
        print("the same adapters, stored in three ways", file=sys.stderr, flush=True)
        return figures, list(layouts(home, model, config, scratch))


def _in_a_process(phase: Callable[..., Figures], *args: Any) -> Figures:
    """What the phase measured in a process of its own, and the most memory that this process had."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        return child.submit(_measured, phase, args).result()


def _measured(phase: Callable[..., Figures], args: tuple[Any, ...]) -> Figures:
    share_arenas()
    return phase(*args) | {"peak_bytes": peak_resident_bytes()}
