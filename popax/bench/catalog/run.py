"""`popax bench catalog` from end to end."""

import tempfile
from pathlib import Path
from typing import Any

from popax.bench.catalog import measure
from popax.bench.catalog.config import BenchCatalogConfig
from popax.bench.catalog.layouts import layouts
from popax.bench.catalog.measure import Figures, Say
from popax.modeling.config import ModelConfig


def bench_catalog(
    model: ModelConfig, config: BenchCatalogConfig, *, place: Path | None = None, say: Say = lambda line: None
) -> tuple[Figures, list[dict[str, Any]]]:
    """(figures, a row for each way of storing). place: a directory where the catalog is kept; an interrupted build goes
    on there. Without it everything is temporary. Raises CatalogError where the audit finds anything wrong."""
    with tempfile.TemporaryDirectory(prefix="popax-bench-catalog-") as folder:
        scratch = Path(folder)
        home = place or scratch / "catalog"
        figures = measure.build(home, model, config, say)
        say("built; loading")
        # Each opens the catalog anew, and closes it: one cache of nodes at a time is what a server has.
        figures |= measure.open_and_load(home, config)
        figures |= measure.load_large(home, config)
        figures |= measure.one_history(home, config)
        figures |= measure.extract_one(home, config, scratch)
        figures |= measure.audit(home, config, say)
        figures |= measure.memory()
        say("the same adapters, stored in three ways")
        return figures, list(layouts(home, model, config, scratch))
