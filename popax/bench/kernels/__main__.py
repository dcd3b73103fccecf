"""`python -m popax.bench.kernels`: every kernel against the clock of an attached device, or through the TPU compiler.

With an accelerator attached, or with --timed, forms are timed on the default device. With --topology, and on a machine
without an accelerator, the TPU compiler counts bytes, FLOPs and memory for slices that are not attached.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from popax.bench.kernels.environment import ENVIRONMENT, TOPOLOGIES
from popax.errors import PopaxError

BUDGET_S = 480.0
DEFAULT_TOPOLOGY = "v5e:2x2"


def configure(made: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    made.add_argument("--topology", nargs="+", help=f"count, for slices of {' '.join(TOPOLOGIES)}; or all")
    made.add_argument("--timed", action="store_true", help="time on the default device, a CPU too")
    made.add_argument("--ops", default="", metavar="REGEX", help="only the ops whose name matches")
    made.add_argument("--specs", default="", metavar="REGEX", help="only the shapes whose name matches")
    made.add_argument("--implementations", default="", metavar="REGEX", help="only these forms: xla, pallas_tpu, ...")
    made.add_argument("--tune", action="store_true", help="write the defaults that follow, kernels/<op>/tuned/*.json")
    made.add_argument("--tuned-root", type=Path, metavar="DIR", help="write them there and not beside the kernels")
    made.add_argument("--budget-s", type=float, default=BUDGET_S, metavar="S", help="timed: stop after this (480)")
    made.add_argument("--repeats", type=int, default=5, metavar="N", help="timed: rounds, of which the median counts")
    made.add_argument("--round-s", type=float, default=0.02, metavar="S", help="timed: length of a form's round")
    made.add_argument("--json", type=Path, metavar="PATH", help="write the report there")
    made.add_argument(
        "--picture", nargs=2, type=Path, metavar=("JSON", "PNG"), help="only draw a timed report's ratios to the floor"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="popax bench kernels", description=__doc__)
    configure(parser)
    args = parser.parse_args(arguments)
    if args.picture:
        from popax.bench.kernels.picture import draw
        from popax.bench.report import read_report

        report, png = args.picture
        draw(read_report(report)["rows"], png)
        print(f"wrote {png}")
        return 0
    if args.timed or (args.topology is None and _accelerator()):
        return _time(args, time.monotonic() + args.budget_s)
    return _count(args, arguments)


def _accelerator() -> bool:
    import jax

    return jax.default_backend() != "cpu"


def _time(args: argparse.Namespace, deadline: float) -> int:
    from popax.bench.kernels import run

    wish = run.Wish(args.ops, args.specs, args.implementations, args.tune)
    report = run.timed_report(
        wish,
        deadline,
        repeats=args.repeats,
        round_s=args.round_s,
        json_path=args.json,
        tuned_root=args.tuned_root,
        say=_say,
    )
    for name, value in report.items():
        _say(f"{name:40s} {value:.4g}" if isinstance(value, float) else f"{name:40s} {value}")
    return 0


def _count(args: argparse.Namespace, arguments: list[str]) -> int:
    from popax.bench.kernels import aot, counted
    from popax.bench.report import write_report

    topologies = args.topology or [DEFAULT_TOPOLOGY]
    topologies = list(TOPOLOGIES) if topologies == ["all"] else topologies
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        # The compiler reads these when Python starts.
        os.execve(
            sys.executable,
            [sys.executable, "-m", "popax.bench.kernels", "--topology", *topologies, *_without_topology(arguments)],
            os.environ | ENVIRONMENT,
        )
    aot.require_compiler()
    rows = []
    chosen = {"ops": args.ops, "specs": args.specs, "implementations": args.implementations}
    for topology in topologies:
        rows += counted.rows(topology, **chosen, say=_say)
    figures = {
        "counted": sum("bytes" in row for row in rows),
        "skipped": sum("skipped" in row for row in rows),
        "failed": sum("failed" in row for row in rows),
    }
    print(", ".join(f"{name} {value}" for name, value in figures.items()))
    if args.tune:
        for path in counted.write_tuned(rows, *([args.tuned_root] if args.tuned_root else [])):
            print(f"wrote {path}")
    if args.json:
        config = {"topologies": topologies, **chosen, "dtype": "bfloat16"}
        write_report(args.json, name="bench kernels", config=config, figures=figures, rows=rows)
        print(f"wrote {args.json}")
    return 0


def _without_topology(arguments: list[str]) -> list[str]:
    """The same arguments once --topology has been read, which takes every word up to the next option."""
    kept, skipping = [], False
    for word in arguments:
        skipping = word == "--topology" or (skipping and not word.startswith("--"))
        kept += [] if skipping else [word]
    return kept


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except PopaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
