"""`popax bench quantised`: the price of a base in fewer bits, in logits and in what users gain."""

import argparse
import functools
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from popax.cli.gin_door import GinDoor, add_arguments
from popax.cli.main import add_json
from popax.errors import ConfigError

if TYPE_CHECKING:
    from popax.bench.quantised import Population

NAME = "quantised"
HELP = "Compare a base in int8, fp8 and int4 with the same in bfloat16: logits, and the gain of users' adapters on it."
EXAMPLE = (
    "popax bench quantised --gin_file configs/runs/irc_ubuntu_users.gin --base runs/irc_base/base "
    "--data messages.jsonl.gz --json quantised.json\n  popax bench quantised --demo --json quantised_demo.json"
)
WIRING = "configs/runs/population.gin"


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument("--base", metavar="DIR", help="a Hugging Face or popax base")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="users' text, as popax train takes it")
    parser.add_argument("--demo", action="store_true", help="the base and the users of popax demo instead")
    parser.add_argument("--cache", metavar="DIR", help="where the demo's base is kept (default: the user's cache)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from popax.bench.quantised import BenchQuantisedConfig, bench_quantised
    from popax.bench.report import write_report

    if args.demo == (args.base is not None) or (args.base is None) != (args.data is None):
        raise ConfigError("give --demo, or --base DIR with --data PATH")
    door = GinDoor([WIRING, *args.gin_file], args.gin_param)
    config = door.build(BenchQuantisedConfig)
    with tempfile.TemporaryDirectory() as scratch:
        population, told = _demo(args, door) if args.demo else _given(args, door, Path(scratch))
        figures, rows = bench_quantised(population, config, say)
    for name, value in figures.items():
        print(f"{name:28s} {value:.4g}" if isinstance(value, float) else f"{name:28s} {value}")
    if args.json:
        told = {"bench": config, "train": population.train, "evaluation": population.evaluation, **told}
        write_report(args.json, name="bench quantised", config=told, figures=figures, rows=rows)
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _given(args: argparse.Namespace, door: GinDoor, scratch: Path) -> "tuple[Population, dict]":
    from popax.bench.quantised import Population
    from popax.data.pipeline import PipelineConfig, UserPipeline
    from popax.data.records import Columns
    from popax.data.tokenize import load_tokenizer
    from popax.evaluation.columns import EvalConfig
    from popax.modeling.base import load_base
    from popax.training.config import TrainConfig
    from popax.training.inputs import open_users

    data = door.build(PipelineConfig)
    dataset = open_users(args.data, scratch, door.build(Columns))
    made = Population(
        load=functools.partial(load_base, args.base),
        pipeline=UserPipeline(dataset, load_tokenizer(args.base), data),
        train=door.build(TrainConfig),
        evaluation=door.build(EvalConfig),
    )
    return made, {"base": Path(args.base).name, "data": data}


def _demo(args: argparse.Namespace, door: GinDoor) -> "tuple[Population, dict]":
    from popax.bench.quantised import Population
    from popax.data.pipeline import UserPipeline
    from popax.data.tokenize import load_tokenizer
    from popax.demo.config import DemoConfig
    from popax.demo.corpus import as_dataset, demo_corpus
    from popax.demo.run import cache_directory, cached_base
    from popax.modeling.base import load_base

    config = door.build(DemoConfig)
    corpus = demo_corpus(config.users, config.max_user_bytes)
    cache = Path(args.cache) if args.cache else cache_directory()
    place, _ = cached_base(config, corpus.base, cache, say, lambda: False)
    made = Population(
        load=functools.partial(load_base, place),
        pipeline=UserPipeline(as_dataset(corpus.users), load_tokenizer(place), config.pipeline()),
        train=config.train(),
        evaluation=config.evaluation(),
    )
    return made, {"demo": config}
