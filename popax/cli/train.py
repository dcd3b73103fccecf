"""`popax train`: a population of users' adapters on a frozen base, committed as revisions, and the table of gains."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popax.cli.base import add_base, base_of
from popax.cli.eval import add_data, finish
from popax.cli.gin_door import GinDoor, add_arguments
from popax.cli.keys import add_sign, add_trust, signer_of, trust_of
from popax.cli.main import add_json
from popax.cli.processes import add_processes, open_mesh

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from popax.training.report import RunReport
    from popax.training.session import Session

NAME = "train"
HELP = (
    "Train every user's adapter and commit it as a revision; Ctrl-C checkpoints, the same command continues, and with "
    "more data trains who has something new."
)
EXAMPLE = (
    "popax train --gin_file configs/runs/irc_ubuntu_users.gin --base runs/irc_base/base --data messages.jsonl.gz "
    "--users_with_at_least 100 --out runs/irc"
)
# Everything else went well; who was left as they are, and why, is printed and in the report.
EXIT_SET_ASIDE = 3
SHOWN = 10
# Makes the optimizer, the schedule and early stopping reachable by their own keys: `adamw.weight_decay = 0.1`.
WIRING = "configs/runs/population.gin"


def configure(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    add_base(parser, "a Hugging Face or popax base", serves=False)
    add_data(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="the run's directory")
    parser.add_argument("--catalog", metavar="DIR", help="where revisions are committed (default: OUT/catalog)")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer's path, or byte (default: the base's)")
    parser.add_argument("--users_with_at_least", type=int, default=0, metavar="N", help="only users with N examples")
    parser.add_argument("--everyone", action="store_true", help="also users without new data since their revision")
    parser.add_argument(
        "--close_stopped",
        action="store_true",
        help="where the directory's round was stopped and its data have changed: close it, and begin a new round",
    )
    parser.add_argument("--no_table", action="store_true", help="neither train the shared adapter nor compare")
    add_sign(parser)
    add_trust(parser)
    add_processes(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    with open_mesh(args) as mesh:
        return _run(args, mesh)


def _run(args: argparse.Namespace, mesh: "Mesh | None") -> int:
    from popax.distributed.group import ProcessGroup
    from popax.errors import ConfigError, Preempted
    from popax.training.interrupt import StopOnSignal

    started, group = time.monotonic(), ProcessGroup.current()
    if group.count > 1 and not args.no_table:
        raise ConfigError(
            f"the table is not made by {group.count} processes: give --no_table, then run popax eval in one process"
        )
    door = GinDoor([WIRING, *args.gin_file], args.gin_param)
    whole = _open(args, door, mesh)
    place, reports = args.catalog or str(whole.directory / "catalog"), []
    sessions, alone = whole.by_cohort()
    for session in sessions:
        session.check()
    with StopOnSignal() as stop:
        for session in sessions:
            report = session.train(
                everyone=args.everyone,
                close_stopped=args.close_stopped,
                save_config=lambda at=session.directory: door.save(at),
                stop_requested=stop,
            )
            reports.append(report)
            trained = sum(len(each.trained) for each in reports)
            if not report.finished:
                saved = (
                    f"{trained} users are committed in {place}, those in training are checkpointed in "
                    f"{session.directory} (iteration {report.iterations}); the same command continues from there"
                )
                # One process's signal is everybody's.
                raise Preempted(saved) if group.any_of(stop.preempted) else KeyboardInterrupt(saved)
            if group.leads:
                print(f"{place}: {_which(whole, session)}{_summary(report)}")
                _tell(report)
    left = any(report.set_aside for report in reports)
    if not group.leads:
        return EXIT_SET_ASIDE if left else 0
    if alone:
        print(f"{len(alone)} users stay with the base alone")
    scores = []
    if not args.no_table:
        try:
            for session in sessions:
                scores += session.compare()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"all users are committed in {place}; the same command makes the table") from None
    counts = {
        "users_trained": sum(len(report.trained) for report in reports),
        "users_up_to_date": sum(report.up_to_date for report in reports),
        "users_with_nothing_to_learn": sum(len(report.nothing_to_learn) for report in reports),
        "users_set_aside": sum(len(report.set_aside) for report in reports),
        "users_with_too_few_examples": sum(len(report.too_few) for report in reports),
        "skipped_steps": sum(report.skipped_steps for report in reports),
        "iterations": sum(report.iterations for report in reports),
        **({"cohorts": len(sessions), "users_of_the_base_alone": len(alone)} if whole.config.cohorts else {}),
    }
    record = {"train": whole.config, "data": whole.pipeline.config, "base": whole.base.digest}
    record |= {"run": ", ".join(report.run for report in reports), "rounds": [_record_of(one) for one in reports]}
    finish(args, "train", record, counts, scores, started)
    if not args.no_table:
        for session in sessions:
            session.tabled()
    return EXIT_SET_ASIDE if left else 0


def _summary(report: "RunReport") -> str:
    """One line. A round that began with nothing new has no skipped steps to tell of, and so on."""
    parts = [
        f"{len(report.trained)} users trained in {report.iterations} iterations",
        f"{report.up_to_date} up to date",
        f"{len(report.nothing_to_learn)} with nothing to learn from",
    ]
    if report.too_few:
        parts.append(f"{len(report.too_few)} with too few examples ({_some(report.too_few)})")
    if report.listed_twice:
        parts.append(f"{len(report.listed_twice)} listed twice and trained once ({_some(report.listed_twice)})")
    if report.skipped_steps:
        parts.append(f"{report.skipped_steps} steps skipped because something in them was not finite")
    if report.set_aside:
        parts.append(f"{len(report.set_aside)} set aside")
    return ", ".join(parts)


def _tell(report: "RunReport") -> None:
    """On stderr: whom a closed round was training, and who was set aside, by name."""
    if report.closed is not None:
        had = ", ".join(f"{_name(user)}@{revision or 'none'}" for user, revision in report.closed.in_training.items())
        print(
            f"closed run {report.closed.run}, stopped at iteration {report.closed.iteration}: users in training fall "
            f"back to the revision they have ({had or 'nobody was in training'})",
            file=sys.stderr,
        )
    for one in report.set_aside[:SHOWN]:
        print(f"set aside: {_name(one.user)}: {one.reason}", file=sys.stderr)
    if len(report.set_aside) > SHOWN:
        more = len(report.set_aside) - SHOWN
        print(f"set aside: {more} more, all of them in the report that --json writes", file=sys.stderr)


def _record_of(report: "RunReport") -> dict[str, Any]:
    """The report without the list of who was trained, whose revisions are in the catalog."""
    return {name: value for name, value in report.to_dict().items() if name != "trained"}


def _some(users: Sequence[str]) -> str:
    return ", ".join(map(_name, users[:3])) + (", ..." if len(users) > 3 else "")


def _name(user: str) -> str:
    from popax.cli.users.shared import printable

    return printable(user)


def _which(whole: "Session", session: "Session") -> str:
    """Of several cohorts, which."""
    adapter = session.config.adapter
    return f"{adapter.method} of rank {adapter.rank}: " if whole.config.cohorts else ""


def _open(args: argparse.Namespace, door: GinDoor, mesh: "Mesh | None") -> "Session":
    from popax.adapters.cohort import Cohort
    from popax.data.pipeline import PipelineConfig, UserPipeline
    from popax.data.records import Columns
    from popax.data.tokenize import load_tokenizer
    from popax.distributed.group import ProcessGroup
    from popax.evaluation.columns import EvalConfig
    from popax.store.catalog import Catalog
    from popax.training.config import TrainConfig
    from popax.training.inputs import check_fits, open_users, select_users
    from popax.training.rounds import refuse_stopped
    from popax.training.session import Session

    out = Path(args.out)
    config, data, columns = door.build(TrainConfig), door.build(PipelineConfig), door.build(Columns)
    evaluation = door.build(EvalConfig)
    base, tokenizer = base_of(args, mesh), load_tokenizer(args.tokenizer or args.base)
    # What does not fit is refused before anything is read or written.
    check_fits(base.model, tokenizer, data.seq_len)
    for adapter in [rule.adapter for rule in config.cohorts] or [config.adapter]:
        if adapter is not None:
            virtual = Cohort.of(adapter, base.model.sites()).virtual_tokens
            check_fits(base.model, tokenizer, data.seq_len, virtual)
    keys = {"signer": signer_of(args), "trusted": trust_of(args)}
    first = ProcessGroup.current().leader_first
    dataset = first(
        lambda: open_users(
            args.data,
            out / "data",
            columns,
            progress=sys.stderr.isatty(),
            set_aside=True,
            may_replace=lambda: None if args.close_stopped else refuse_stopped(out, out / "data"),
        )
    )
    users = [*select_users(dataset, at_least=args.users_with_at_least), *dataset.refused()]
    return Session(
        base=base,
        pipeline=UserPipeline(dataset, tokenizer, data),
        config=config,
        evaluation=evaluation,
        catalog=first(lambda: Catalog.open(args.catalog or str(out / "catalog"), create=True, **keys)),
        users=users,
        directory=out,
        mesh=mesh,
    )
