"""`popax bench catalog` from end to end."""

import tempfile
from pathlib import Path
from typing import Any

from popax.bench.catalog import measure
from popax.bench.catalog.config import BenchCatalogConfig
from popax.bench.catalog.layouts import layouts
from popax.bench.catalog.measure import Figures, Say
from popax.bench.catalog.population import bulk_order, register
from popax.modeling.config import ModelConfig
from popax.store.catalog import Catalog


def bench_catalog(
    model: ModelConfig, config: BenchCatalogConfig, *, place: Path | None = None, say: Say = lambda line: None
) -> tuple[Figures, list[dict[str, Any]]]:
    """(figures, a row for each way of storing). place: a directory where the catalog is kept; an interrupted build goes
    on there. Without it everything is temporary. Raises CatalogError where the audit finds anything wrong."""
    with tempfile.TemporaryDirectory(prefix="popax-bench-catalog-") as folder:
        scratch = Path(folder)
        home = place or scratch / "catalog"
        bench = register(Catalog.open(home, create=True), model, config)
        say(f"rows of {bench.small.layout.row_bytes:,} and {bench.large.layout.row_bytes:,} bytes in {home}")
        order = bulk_order(config.users)
        figures = measure.build(bench, order, config, home, say)
        say("built; loading")
        figures |= measure.open_and_load(home, config, order)
        figures |= measure.load_large(home, config)
        figures |= measure.one_history(bench, config)
        figures |= measure.extract_one(home, config, scratch)
        figures |= measure.audit(home, config, say)
        figures |= measure.memory()
        say("the same adapters, stored in three ways")
        return figures, list(layouts(bench, config, scratch))
