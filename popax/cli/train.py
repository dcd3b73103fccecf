"""`popax train`: a population of users' adapters on a frozen base, committed as revisions, and the table of gains."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from popax.cli.base import add_base, base_of
from popax.cli.eval import add_data, finish
from popax.cli.gin_door import GinDoor, add_arguments
from popax.cli.keys import add_sign, add_trust, signer_of, trust_of
from popax.cli.main import add_json
from popax.cli.processes import add_processes, open_mesh

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from popax.training.session import Session

NAME = "train"
HELP = "Train every user's adapter and commit it as a revision; Ctrl-C checkpoints, the same command continues."
EXAMPLE = (
    "popax train --gin_file configs/runs/irc_ubuntu_users.gin --base runs/irc_base/base --data messages.jsonl.gz "
    "--users_with_at_least 100 --out runs/irc"
)
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
    with StopOnSignal() as stop:
        for session in sessions:
            report = session.train(
                everyone=args.everyone, save_config=lambda at=session.directory: door.save(at), stop_requested=stop
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
                print(
                    f"{place}: {_which(whole, session)}{len(report.trained)} users trained in {report.iterations} "
                    f"iterations, {report.up_to_date} up to date, {len(report.nothing_to_learn)} with nothing to "
                    "learn from"
                )
    if not group.leads:
        return 0
    if alone:
        print(f"{len(alone)} users stay with the base alone")
    scores = []
    if not args.no_table:
        try:
            for session, report in zip(sessions, reports, strict=True):
                scores += session.compare(report.run)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"all users are committed in {place}; the same command makes the table") from None
    counts = {
        "users_trained": sum(len(report.trained) for report in reports),
        "users_up_to_date": sum(report.up_to_date for report in reports),
        "iterations": sum(report.iterations for report in reports),
        **({"cohorts": len(sessions), "users_of_the_base_alone": len(alone)} if whole.config.cohorts else {}),
    }
    record = {"train": whole.config, "data": whole.pipeline.config, "base": whole.base.digest}
    finish(args, "train", record | {"run": ", ".join(report.run for report in reports)}, counts, scores, started)
    return 0


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
    from popax.training.session import Session

    out = Path(args.out)
    config, data, columns = door.build(TrainConfig), door.build(PipelineConfig), door.build(Columns)
    evaluation = door.build(EvalConfig)
    base, tokenizer = base_of(args, mesh), load_tokenizer(args.tokenizer or args.base)
    # What does not fit is refused before anything is read or written.
    check_fits(base.model, tokenizer, data.seq_len)
    for adapter in [rule.adapter for rule in config.cohorts] or [config.adapter]:
        if adapter is not None:
            Cohort.of(adapter, base.model.sites())
    keys = {"signer": signer_of(args), "trusted": trust_of(args)}
    first = ProcessGroup.current().leader_first
    dataset = first(lambda: open_users(args.data, out / "data", columns, progress=sys.stderr.isatty()))
    users = select_users(dataset, at_least=args.users_with_at_least)
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
