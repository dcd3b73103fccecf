"""What benchmarks on users' text have in common: their flags, and the base, the text and the users that these name."""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from popax.cli.base import add_base, base_of
from popax.cli.eval import add_data
from popax.cli.gin_door import GinDoor, add_arguments
from popax.cli.main import add_json

if TYPE_CHECKING:
    from popax.data.pipeline import UserPipeline
    from popax.modeling.base import Base

WIRING = "configs/runs/population.gin"


class OnUsers(NamedTuple):
    """users: as many as were asked for, the data's first ones."""

    base: "Base"
    pipeline: "UserPipeline"
    users: list[str]


def configure_users(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    add_base(parser, "a Hugging Face or popax base", serves=False)
    add_data(parser)
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer's path, or byte (default: the base's)")
    parser.add_argument("--users_with_at_least", type=int, default=0, metavar="N", help="only users with N examples")
    add_json(parser)


@contextlib.contextmanager
def opened_users(args: argparse.Namespace, door: GinDoor, count: int, asked: str) -> Iterator[OnUsers]:
    """asked: whose they are, for the error where the data has fewer."""
    from popax.data.pipeline import PipelineConfig, UserPipeline
    from popax.data.records import Columns
    from popax.data.tokenize import load_tokenizer
    from popax.errors import DataError
    from popax.training.inputs import check_fits, open_users, select_users

    data, columns = door.build(PipelineConfig), door.build(Columns)
    base, tokenizer = base_of(args), load_tokenizer(args.tokenizer or args.base)
    check_fits(base.model, tokenizer, data.seq_len)
    with tempfile.TemporaryDirectory() as scratch:
        dataset = open_users(args.data, Path(scratch), columns)
        users = select_users(dataset, at_least=args.users_with_at_least)
        if len(users) < count:
            raise DataError(f"the data has {len(users)} such users, {asked} are asked for")
        yield OnUsers(base, UserPipeline(dataset, tokenizer, data), users[:count])
