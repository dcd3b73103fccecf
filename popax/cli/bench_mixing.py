"""`popax bench mixing`: experts mixed for users who have none of their own."""

import argparse
import sys
import time

from popax.cli.bench_users import WIRING, configure_users, opened_users
from popax.cli.gin_door import GinDoor

NAME = "mixing"
HELP = "Train expert adapters, mix them for held-out users by search and by descent; scores against every expert alone."
EXAMPLE = (
    "popax bench mixing --gin_file configs/runs/expert_mixing.gin --base runs/irc_base/base "
    "--data messages.jsonl.gz --users_with_at_least 100 --json mixing.json"
)


configure = configure_users


def run(args: argparse.Namespace) -> int:
    from popax.adapters.base import AdapterConfig
    from popax.bench.mixing import MixingConfig, bench_mixing, figures_of, verdict
    from popax.bench.report import write_report
    from popax.training.config import TrainConfig

    started, door = time.monotonic(), GinDoor([WIRING, *args.gin_file], args.gin_param)
    config = door.build(MixingConfig)
    adapter, train = door.build(AdapterConfig), door.build(TrainConfig)
    rows: list[dict] = []

    asked = f"{config.experts} experts and {config.users} others"
    with opened_users(args, door, config.experts + config.users, asked) as on:

        def report() -> None:
            record = {
                "mixing": config,
                "adapter": adapter,
                "train": train,
                "data": on.pipeline.config,
                "base": on.base.digest,
            }
            figures = {**figures_of(rows), "seconds": time.monotonic() - started}
            said = {"verdict": verdict(figures)}
            write_report(args.json, name="bench mixing", config=record | said, figures=figures, rows=rows)

        say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
        try:
            for row in bench_mixing(*on, adapter, config, train, progress=say):
                rows.append(row)
                if args.json:
                    report()  # whole after every user
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{len(rows)} users are in {args.json or 'no report (--json)'}") from None
    figures = figures_of(rows)
    for name, value in figures.items():
        print(f"{name:34s} {value:10.4f}")
    print(verdict(figures))
    return 0
