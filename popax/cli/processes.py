"""The flags of a command that several processes can run together, and how such a command begins and ends."""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from popax.distributed.supervisor import is_supervised, supervise

if TYPE_CHECKING:
    from jax.sharding import Mesh

LEADER_WAITS_S = 1.0


def add_processes(parser: argparse.ArgumentParser) -> None:
    """--distributed and what it needs, --mesh."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes: which, the flags below or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES "
        "and JAX_PROCESS_ID say; without them jax detects it (TPU pod slices, Slurm, GKE)",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached, the same for all")
    parser.add_argument("--num_processes", type=int, metavar="N", help="how many processes there are")
    parser.add_argument("--process_id", type=int, metavar="I", help="which one this is, from 0")
    parser.add_argument(
        "--lost_after", type=float, default=60.0, metavar="SECONDS", help="a process silent for so long is lost (60)"
    )
    parser.add_argument(
        "--start_within", type=float, default=300.0, metavar="SECONDS", help="all processes come within this time (300)"
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS=SIZE,...",
        help="spread over all devices, such as population=4,fsdp=2 (default: one device; with --distributed, all of "
        "them along population)",
    )


def supervised(args: argparse.Namespace, arguments: Sequence[str]) -> int | None:
    """The exit code of the child that does the work, where this is to be its parent; else None: do the work here."""
    return supervise(arguments) if getattr(args, "distributed", False) and not is_supervised() else None


@contextlib.contextmanager
def open_mesh(args: argparse.Namespace) -> Iterator["Mesh | None"]:
    """The command's mesh, None for one device; inside, the processes are together. Before any other use of jax."""
    with contextlib.ExitStack() as opened:
        if args.distributed:
            from popax.distributed.bootstrap import ProcessConfig, several_processes

            config = ProcessConfig(
                coordinator=args.coordinator,
                num_processes=args.num_processes,
                process_id=args.process_id,
                lost_after=args.lost_after,
                start_within=args.start_within,
            )
            opened.enter_context(several_processes(config.with_environment(os.environ)))
        from popax.sharding import make_mesh

        yield make_mesh(args.mesh) if args.mesh or args.distributed else None


def is_one_of_several(args: argparse.Namespace) -> bool:
    """Whether this is a process of a run of several."""
    return getattr(args, "distributed", False) and is_supervised()


def leave(args: argparse.Namespace, code: int) -> None:
    """End one of several processes after an error at once: exit handlers would wait for the others."""
    if not is_one_of_several(args):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if "jax" in sys.modules:
        import jax

        if jax.distributed.is_initialized() and jax.process_index() == 0:
            # The coordinator goes with this process, and jax aborts who misses it: let the others end by themselves.
            time.sleep(LEADER_WAITS_S)
    os._exit(code)
