"""`popax bench kernels`: seconds on an attached device, or bytes, FLOPs and memory as the TPU compiler counts them."""

import argparse
import subprocess
import sys

NAME = "kernels"
HELP = "Time every kernel and its XLA rivals on the attached device, or count for TPUs that are not attached."
EXAMPLE = (
    "popax bench kernels --tune --json kernels_h200.json\n"
    "  popax bench kernels --picture kernels_h200.json kernels_h200.png\n"
    "  popax bench kernels --topology v5e:2x2 --ops stacked --specs qwen3_8b\n"
    "  popax bench kernels --topology all --tune --json kernels_tpu.json"
)


def configure(parser: argparse.ArgumentParser) -> None:
    from popax.bench.kernels.__main__ import configure as options

    options(parser)


def run(args: argparse.Namespace) -> int:
    # A process of its own: the compiler's settings must be there before Python starts.
    return subprocess.run([sys.executable, "-m", "popax.bench.kernels", *words(args)], check=False).returncode


def words(args: argparse.Namespace) -> list[str]:
    """The options as the other process reads them."""
    made: list[str] = []
    for name in ("topology", "picture"):
        if getattr(args, name):
            made += [f"--{name}", *map(str, getattr(args, name))]
    for name in ("ops", "specs", "implementations", "json", "tuned_root", "budget_s", "repeats", "round_s"):
        if getattr(args, name) not in (None, ""):
            made += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return made + [f"--{name}" for name in ("timed", "tune") if getattr(args, name)]
