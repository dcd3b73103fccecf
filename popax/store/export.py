"""Manifests as one Parquet file, a row a revision, for whatever reads Parquet."""

import json
import os
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from popax.atomic import new_file
from popax.store.catalog import EVERYONE, Catalog
from popax.store.filters import UserFilter
from popax.store.manifest import Manifest, UserRecord

SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("revision", pa.int64()),
        ("is_latest", pa.bool_()),
        ("is_promoted", pa.bool_()),
        ("tags", pa.list_(pa.string())),
        ("created", pa.timestamp("ms", tz="UTC")),
        ("parent", pa.int64()),
        ("run", pa.string()),
        ("cohort", pa.string()),
        ("base_digest", pa.string()),
        ("method", pa.string()),
        ("rank", pa.int64()),
        ("digest", pa.string()),
        ("shard", pa.int64()),
        ("row", pa.int64()),
        ("version", pa.string()),
        ("metrics", pa.map_(pa.string(), pa.float64())),
        ("manifest", pa.string()),
    ],
    metadata={"popax": "one row a revision; `metrics` holds the numbers at the top level, `manifest` everything, JSON"},
)
ROW_GROUP = 10_000


def export_parquet(
    catalog: Catalog,
    path: str | os.PathLike[str],
    *,
    where: UserFilter = EVERYONE,
    latest_only: bool = False,
    group: int = ROW_GROUP,
    progress: Callable[[int], None] = lambda revisions: None,
) -> int:
    """Write all manifests of these users, or the latest only; returns how many.

    The file is whole or absent. `group` rows are in memory at a time; progress(revisions written) is called for each.
    """
    written = 0
    with new_file(path) as partial, pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
        rows: list[dict[str, Any]] = []
        for record, latest in catalog.users(where):
            manifests = [latest] if latest_only or record.latest == record.oldest else catalog.history(record)
            rows += [_row(record, manifest) for manifest in manifests]
            if len(rows) >= group:
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                written, rows = written + len(rows), []
                progress(written)
        writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
        written += len(rows)
    return written


def _row(record: UserRecord, manifest: Manifest) -> dict[str, Any]:
    plain = manifest.to_dict()
    kept = {name: plain[name] for name in SCHEMA.names if name in plain}
    return {
        **kept,
        "is_latest": manifest.revision == record.latest,
        "is_promoted": manifest.revision == record.promoted,
        "tags": sorted(name for name, at in record.tags.items() if at == manifest.revision),
        "created": pa.scalar(manifest.created).cast(pa.timestamp("ms", tz="UTC")).as_py(),
        "method": manifest.config["method"],
        "rank": manifest.config["rank"],
        "metrics": [(name, float(value)) for name, value in manifest.metrics.items() if _is_number(value)],
        "manifest": json.dumps(plain, sort_keys=True),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
