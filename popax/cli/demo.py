"""`popax demo`: the whole road on this machine, without a download."""

import argparse
import dataclasses
import time
from pathlib import Path

from popax.cli.gin_door import add_arguments, open_door

NAME = "demo"
HELP = "Train, store, serve and extract 64 users' adapters here: the users are Python's standard library packages."
EXAMPLE = "popax demo --json demo.json\n  popax demo --gin_param 'DemoConfig.rank=4' --out runs/demo_r4"
REPORT, PICTURE = "demo.json", "gains.png"


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="the run's directory (default: runs/demo)")
    parser.add_argument("--cache", metavar="DIR", help="where the base is kept (default: the user's cache directory)")
    parser.add_argument("--json", metavar="PATH", help="also write the report here; DIR always holds it")


def run(args: argparse.Namespace) -> int:
    from popax.bench.report import write_report
    from popax.demo.config import DemoConfig
    from popax.demo.picture import draw_gains
    from popax.demo.run import Stopped, cache_directory, next_directory, run_demo
    from popax.evaluation.catalog import table_lines
    from popax.evaluation.columns import figures
    from popax.training.interrupt import StopOnSignal

    started, door = time.monotonic(), open_door(args)
    config = door.build(DemoConfig)
    directory = next_directory(Path(args.out), REPORT)
    cache = Path(args.cache) if args.cache else cache_directory()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {line}", flush=True)

    with StopOnSignal() as stop:
        try:
            result = run_demo(
                config, directory=directory, cache=cache, say=say, stop_requested=stop, save_config=door.save
            )
        except Stopped as kept:
            raise KeyboardInterrupt(str(kept)) from None
    gains = figures(result.scores)
    rows = [dataclasses.asdict(row) for row in result.scores]
    print("\n".join(table_lines(result.scores, gains)))
    for text in result.texts:
        print(f"\n--- {text.name} continues {text.prompt!r}:\n{text.prompt}{text.text}")
    draw_gains(rows, directory / PICTURE)
    seconds = time.monotonic() - started
    for path in filter(None, (args.json, directory / REPORT)):
        write_report(
            path, name=NAME, config={"demo": config}, figures={**gains, **result.facts, "seconds": seconds}, rows=rows
        )
    print(
        f"\n{gains['own_beats_base']:.0%} of users are better with their own adapter than with the base, "
        f"{gains['own_beats_wrong']:.0%} than with another user's, {gains['own_beats_shared']:.0%} than with the "
        f"shared one ({seconds:.0f} s)\nwrote {directory}: catalog, {PICTURE}, {REPORT}, "
        f"{result.extracted.name} (a PEFT directory)"
    )
    return 0
