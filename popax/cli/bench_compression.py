"""`popax bench compression`: what storing a population's adapters in fewer bytes costs."""

import argparse
import sys
import tempfile
from pathlib import Path

from popax.cli.base import add_base, base_of
from popax.cli.eval import add_data
from popax.cli.gin_door import add_arguments, open_door
from popax.cli.main import add_json

NAME = "compression"
HELP = "Bytes a user, error and bits per byte of a trained population's rows in each form; the catalog stays as it is."
EXAMPLE = (
    "popax bench compression --gin_file runs/irc/operative.gin --base runs/irc_base/base --catalog runs/irc/catalog "
    "--data runs/irc/data --json bench_compression.json"
)


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    add_base(parser, "the base that the adapters were made for")
    parser.add_argument("--catalog", required=True, metavar="DIR", help="the users' adapters")
    add_data(parser)
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer's path, or byte (default: the base's)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.bench.compression import BenchCompressionConfig, bench_compression
    from popax.bench.report import write_report
    from popax.data.pipeline import PipelineConfig, UserPipeline
    from popax.data.records import Columns
    from popax.data.tokenize import load_tokenizer
    from popax.evaluation.columns import EvalConfig
    from popax.store.catalog import Catalog
    from popax.training.inputs import check_fits, open_users

    door = open_door(args)
    data, evaluation, columns = door.build(PipelineConfig), door.build(EvalConfig), door.build(Columns)
    config = door.build(BenchCompressionConfig)
    base, tokenizer = base_of(args), load_tokenizer(args.tokenizer or args.base)
    check_fits(base.model, tokenizer, data.seq_len)
    catalog = Catalog.open(args.catalog, read_only=True)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        dataset = open_users(args.data, Path(scratch), columns)
        known = set(dataset.users())
        users = [record.user for record in catalog.list() if record.user in known]
        pipeline = UserPipeline(dataset, tokenizer, data)
        figures, rows = bench_compression(base, pipeline, catalog, users, evaluation, config, say=say)
    for name, value in figures.items():
        print(f"{name:28s} {value:.4g}" if isinstance(value, float) else f"{name:28s} {value}")
    for row in rows:
        print(
            "  ".join(
                f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items()
            )
        )
    if args.json:
        record = {"data": data, "evaluation": evaluation, "bench": config, "base": base.digest}
        write_report(args.json, name="bench compression", config=record, figures=figures, rows=rows)
    return 0
