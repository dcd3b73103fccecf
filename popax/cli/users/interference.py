"""`popax users interference`: how much users' adapters disturb each other when they are added."""

import argparse
import itertools
import sys
import time

from popax.cli.main import add_json
from popax.cli.users.shared import add_catalog, add_filters, filters_of, open_catalog, printable

NAME = "interference"
HELP = "Cosines between all users' changes of the weights: how much a plain sum of adapters disturbs each of them."
EXAMPLE = (
    "popax users interference runs/irc/catalog --prefix a --limit 1000 --json interference.json --matrix cosine.npy"
)


def configure(parser: argparse.ArgumentParser) -> None:
    add_catalog(parser)
    add_filters(parser)
    parser.add_argument("--limit", type=int, default=1000, metavar="N", help="at most so many users (1000)")
    parser.add_argument("--pairs", type=int, default=10, metavar="N", help="so many pairs are shown (10)")
    parser.add_argument("--matrix", metavar="PATH.npy", help="write all cosines, float32 [N, N]")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from popax.bench.report import write_report
    from popax.store.filters import UserFilter
    from popax.store.interference import user_interference

    catalog = open_catalog(args)
    found = itertools.islice(catalog.users(UserFilter(**filters_of(args))), args.limit)
    users = sorted(record.user for record, _ in found)
    started = time.monotonic()
    told = user_interference(
        catalog,
        catalog.resolve([(user, None) for user in users]),
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    seconds = time.monotonic() - started
    figures, pairs = {**told.figures(), "seconds": seconds}, told.pairs(args.pairs)
    if args.matrix:
        np.save(args.matrix, told.cosine_NxN)
    print(
        f"{len(users):,} users in {seconds:.1f} s: mean cosine {figures['mean_cosine']:+.4f}, mean size "
        f"{figures['mean_abs_cosine']:.4f}, largest {figures['max_abs_cosine']:.4f}"
    )
    for pair in pairs:
        print(f"{pair['cosine']:+.4f}  {printable(pair['user'])}  {printable(pair['other'])}")
    if args.json:
        write_report(args.json, name="interference", config={"catalog": args.catalog}, figures=figures, rows=pairs)
    return 0
