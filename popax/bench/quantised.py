"""What a base in fewer bits costs: its logits beside the full ones, and what users gain from adapters on it."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popax.data.pipeline import UserPipeline
from popax.errors import ConfigError
from popax.evaluation.columns import EvalConfig, figures
from popax.modeling.base import Base
from popax.modeling.quantise_rules import as_rules
from popax.store.catalog import Catalog
from popax.training.config import TrainConfig
from popax.training.session import Session, score
from popax.types import Batch, Params

FULL = "bfloat16"
EXACT = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchQuantisedConfig:
    """schemes: as ModelConfig.quantise; each is compared with the base in bfloat16, whose adapters it also serves.

    users: so many, those with most text. logit_rows: held-out rows whose logits are compared with the float32 base's.
    """

    schemes: tuple[str, ...] = ("int8", "fp8", "int4:32", "int4")
    users: int = 16
    logit_rows: int = 32

    def __post_init__(self):
        object.__setattr__(self, "schemes", tuple(self.schemes))
        if not self.schemes or self.users < 2 or self.logit_rows < 1:
            raise ConfigError(f"{self}: at least one scheme, two users and one row")
        for scheme in self.schemes:
            as_rules(scheme)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Population:
    """Whose gain is measured, and how they are trained and scored. load(quantise, param_dtype, keep_digest) -> Base."""

    load: Callable[..., Base]
    pipeline: UserPipeline
    train: TrainConfig
    evaluation: EvalConfig


def bench_quantised(
    population: Population, config: BenchQuantisedConfig, say: Callable[[str], None] = lambda line: None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures, rows), a row for each base. Every population is trained alike, on the base of its row."""
    dataset = population.pipeline.dataset
    users = sorted(dataset.users(), key=lambda user: (-dataset.num_examples(user), user))[: config.users]
    batch = held_out(population.pipeline, users, config.logit_rows)
    exact = population.load(param_dtype=EXACT)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        full = Path(scratch) / FULL
        for scheme in (FULL, *config.schemes):
            quantise = None if scheme == FULL else scheme
            base = population.load(param_dtype=FULL, quantise=quantise)
            row = {"weights": scheme, "bytes": stored_bytes(base.params), **logit_error(exact, base, batch)}
            row |= _gain(population, base, users, Path(scratch) / scheme)
            if quantise is not None:
                # The same weights under the name that the full base's adapters were made for.
                served = population.load(param_dtype=FULL, quantise=quantise, keep_digest=True)
                catalog = Catalog.open(str(full / "catalog"), read_only=True)
                scores = score(served, population.pipeline, catalog, users, population.evaluation, None)
                row["full_bases_adapters"] = figures(scores)["mean_own_bits_per_byte"]
            say(
                ", ".join(
                    f"{name} {value:.4g}" if isinstance(value, float) else str(value) for name, value in row.items()
                )
            )
            rows.append(row)
    found: dict[str, Any] = {"users": len(users), "parameters": exact.model.num_params}
    for row in rows:
        found[f"gain_{row['weights']}"] = row["gain"]
        found[f"top1_agreement_{row['weights']}"] = row["top1_agreement"]
    return found, rows


def _gain(population: Population, base: Base, users: Sequence[str], directory: Path) -> dict[str, Any]:
    """Bits per byte of held-out text under the base, the own and another user's adapter, trained here on this base."""
    session = Session(
        base=base,
        pipeline=population.pipeline,
        config=population.train,
        evaluation=population.evaluation,
        catalog=Catalog.open(str(directory / "catalog"), create=True),
        users=users,
        directory=directory,
    )
    session.train(everyone=True, save_config=lambda: None, stop_requested=lambda: False)
    found = figures(score(base, population.pipeline, session.catalog, users, population.evaluation, None))
    columns = {name: found[f"mean_{name}_bits_per_byte"] for name in ("base", "own", "wrong")}
    beats = {name: found[name] for name in ("own_beats_base", "own_beats_wrong")}
    return {**columns, "gain": columns["base"] - columns["own"], **beats}


def held_out(pipeline: UserPipeline, users: Sequence[str], rows: int) -> Batch:
    """At most so many of the users' held-out rows, [rows, T]: as many of each."""
    own = pipeline.evaluation(users, "future", -(-rows // len(users)))
    return jax.tree.map(lambda leaf: jnp.asarray(np.concatenate(list(leaf))[:rows]), own)


def logit_error(exact: Base, base: Base, batch: Batch) -> dict[str, float]:
    """Of logits against the exact base's, on targets with loss: the largest and the root mean square difference, the
    mean KL divergence in nats, and how often both have the same likeliest token."""
    weights = np.asarray(batch.weights_BxT).reshape(-1) > 0
    wanted, found = (_logits(each, batch)[weights] for each in (exact, base))
    logp, logq = (np.asarray(jax.nn.log_softmax(each, axis=-1), np.float64) for each in (wanted, found))
    error = (found - wanted).astype(np.float64)
    return {
        "max_logit_error": float(np.abs(error).max()),
        "rms_logit_error": float(np.sqrt(np.mean(error**2))),
        "kl_nats": float(np.mean(np.sum(np.exp(logp) * (logp - logq), axis=-1))),
        "top1_agreement": float(np.mean(wanted.argmax(-1) == found.argmax(-1))),
    }


def _logits(base: Base, batch: Batch) -> np.ndarray:
    def run(params: Params, batch: Batch) -> jax.Array:
        return base.model.logits(params, base.model.batch_hidden(params, batch))

    logits_BxTxV = jax.jit(run)(base.params, batch)
    return np.asarray(logits_BxTxV).reshape(-1, logits_BxTxV.shape[-1])


def stored_bytes(params: Params) -> int:
    """Of the parameters, two int4 in a byte."""
    bits = sum(
        leaf.size * (4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize) for leaf in jax.tree.leaves(params)
    )
    return bits // 8
