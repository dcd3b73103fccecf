"""`popax bench catalog`: a catalog of many users, built, loaded and audited on this machine."""

import argparse
import os
from pathlib import Path

from popax.cli.gin_door import BENCH_MODEL, add_arguments, open_door
from popax.cli.main import add_json

NAME = "catalog"
HELP = "Build a catalog of many users, time commits and loads, audit every revision, and compare ways of storing."
EXAMPLE = (
    "popax bench catalog --users 50000 --json bench_catalog.json\n"
    "  popax bench catalog --users 1000000 --place /data/catalog"
)


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument("--users", type=int, metavar="N", help="of small rows (default: BenchCatalogConfig.users)")
    parser.add_argument(
        "--place", metavar="DIRECTORY", help="keep the catalog there; an interrupted build goes on (default: temporary)"
    )
    parser.add_argument("--picture", metavar="PATH", help="write a PNG of the figures beside what was asked for")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from popax.bench.catalog.config import BenchCatalogConfig
    from popax.bench.catalog.picture import draw_catalog
    from popax.bench.catalog.run import bench_catalog
    from popax.bench.report import write_report
    from popax.modeling.config import ModelConfig

    door = open_door(args, model=BENCH_MODEL)
    overrides = {} if args.users is None else {"users": args.users}
    model, config = door.build(ModelConfig), door.build(BenchCatalogConfig, **overrides)
    figures, rows = bench_catalog(model, config, place=Path(args.place) if args.place else None)
    for name, value in figures.items():
        print(f"{name:28s} {_shown(value)}")
    for row in rows:
        print("  ".join(f"{name} {_shown(value)}" for name, value in row.items()))
    if args.picture:
        draw_catalog(figures, rows, args.picture)
    if args.json:
        config_record = {"model": model, "bench": config}
        write_report(args.json, name="bench catalog", config=config_record, figures=figures, rows=rows)
    return 0


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
