"""`popax bench ...`: the measurements that the documentation quotes, each a command."""

NAME = "bench"
HELP = "Measure this machine; every number in the documentation comes from here."
EXAMPLE = "popax bench train --json bench.json"

COMMANDS = {
    "catalog": "popax.cli.bench_catalog",
    "compression": "popax.cli.bench_compression",
    "curve": "popax.cli.bench_curve",
    "kernels": "popax.cli.bench_kernels",
    "load": "popax.cli.bench_load",
    "mixing": "popax.cli.bench_mixing",
    "nightly": "popax.cli.bench_nightly",
    "quantised": "popax.cli.bench_quantised",
    "residency": "popax.cli.bench_residency",
    "serve": "popax.cli.bench_serve",
    "soak": "popax.cli.bench_soak",
    "train": "popax.cli.bench_train",
}
