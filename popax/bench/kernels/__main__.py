"""`python -m popax.bench.kernels`: every kernel through the TPU compiler, for slices that are not attached."""

import argparse
import os
import sys
from pathlib import Path

from popax.bench.kernels.environment import ENVIRONMENT, TOPOLOGIES
from popax.errors import PopaxError


def configure(made: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    made.add_argument("--topology", nargs="+", default=["v5e:2x2"], help=f"slices, of {' '.join(TOPOLOGIES)}; or all")
    made.add_argument("--ops", default="", metavar="REGEX", help="only the ops whose name matches")
    made.add_argument("--specs", default="", metavar="REGEX", help="only the shapes whose name matches")
    made.add_argument("--implementations", default="", metavar="REGEX", help="only these forms: xla, pallas_tpu, ...")
    made.add_argument("--tune", action="store_true", help="write the defaults that follow, kernels/<op>/tuned/*.json")
    made.add_argument("--json", type=Path, metavar="PATH", help="write the report there")


def main(arguments: list[str]) -> int:
    from popax.bench.kernels import aot, counted
    from popax.bench.report import write_report

    parser = argparse.ArgumentParser(prog="popax bench kernels", description=__doc__)
    configure(parser)
    args = parser.parse_args(arguments)
    topologies = list(TOPOLOGIES) if args.topology == ["all"] else args.topology
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        # The compiler reads these when Python starts.
        os.execve(
            sys.executable,
            [sys.executable, "-m", "popax.bench.kernels", *arguments],
            os.environ | ENVIRONMENT,
        )
    aot.require_compiler()
    rows = []
    for topology in topologies:
        chosen = {"ops": args.ops, "specs": args.specs, "implementations": args.implementations}
        rows += counted.rows(topology, **chosen, say=lambda line: print(line, flush=True))
    figures = {
        "counted": sum("bytes" in row for row in rows),
        "skipped": sum("skipped" in row for row in rows),
        "failed": sum("failed" in row for row in rows),
    }
    print(", ".join(f"{name} {value}" for name, value in figures.items()))
    if args.tune:
        for path in counted.write_tuned(rows):
            print(f"wrote {path}")
    if args.json:
        config = {"topologies": topologies, **chosen, "dtype": "bfloat16"}
        write_report(args.json, name="bench kernels", config=config, figures=figures, rows=rows)
        print(f"wrote {args.json}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except PopaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
