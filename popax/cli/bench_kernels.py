"""`popax bench kernels`: bytes, FLOPs and memory of every kernel, as the TPU compiler counts them."""

import argparse
import subprocess
import sys

NAME = "kernels"
HELP = "Compile every kernel and its XLA rivals for TPUs that are not attached, and count bytes, FLOPs and memory."
EXAMPLE = (
    "popax bench kernels --topology v5e:2x2 --ops stacked --specs qwen3_8b\n"
    "  popax bench kernels --topology all --tune --json kernels_tpu.json"
)


def configure(parser: argparse.ArgumentParser) -> None:
    from popax.bench.kernels.__main__ import configure as options

    options(parser)


def run(args: argparse.Namespace) -> int:
    # A process of its own: the compiler's settings must be there before Python starts.
    command = [sys.executable, "-m", "popax.bench.kernels", "--topology", *args.topology]
    for name in ("ops", "specs", "implementations", "json"):
        if getattr(args, name):
            command += [f"--{name}", str(getattr(args, name))]
    return subprocess.run(command + (["--tune"] if args.tune else []), check=False).returncode
