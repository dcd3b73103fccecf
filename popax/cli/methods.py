"""`popax methods`: how small a user's adapter is with each method, on a base of any size."""

import argparse
import os
from pathlib import Path

from popax.atomic import write_text
from popax.cli.gin_door import GinDoor
from popax.cli.main import add_json

NAME = "methods"
HELP = "The size of a user's adapter with each method on these bases, and the chips that hold a million of them."
EXAMPLE = "popax methods configs/models/qwen3_8b.gin configs/models/kimi_k2.gin --json methods.json"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL.gin", help="gin files with a ModelConfig")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of adapters (bfloat16)"
    )
    parser.add_argument("--output", metavar="PATH", help="also write the table as Markdown")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # shapes only
    from popax.bench.report import write_report
    from popax.modeling.config import ModelConfig
    from popax.plan.methods import markdown, method_sizes, usual_methods

    adapters, rows = usual_methods(args.dtype), []
    for path in args.models:
        config = GinDoor([path], []).build(ModelConfig)
        rows += method_sizes(Path(path).stem, config, adapters)
    table = markdown(rows)
    print(table, end="")
    if args.output:
        write_text(args.output, table)
    if args.json:
        figures = {"smallest_bytes_per_user": min(row.bytes_per_user for row in rows)}
        config = {"models": args.models, "dtype": args.dtype}
        write_report(args.json, name="methods", config=config, figures=figures, rows=[row.to_dict() for row in rows])
    return 0
