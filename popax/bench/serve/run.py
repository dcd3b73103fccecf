"""`popax bench serve` from end to end."""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from popax.bench.host_memory import resident_bytes
from popax.bench.serve.config import BenchServeConfig
from popax.bench.serve.load import Client, Done, wishes, zipf_users
from popax.bench.serve.population import fill_catalog, user_id
from popax.data.tokenize import load_tokenizer
from popax.modeling.base import Base, new_base
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.serving.engine import Engine
from popax.serving.names import Names
from popax.serving.programs import CompilationCounter, EngineShapes
from popax.serving.rooms import rooms_of

Figures = dict[str, Any]


def bench_serve(model: ModelConfig, config: BenchServeConfig, shapes: EngineShapes) -> Figures:
    """All figures; progress goes to stderr."""
    net = Model(model)
    base = new_base(net, net.init(jax.random.key(config.seed)), source="random weights")
    with tempfile.TemporaryDirectory(prefix="popax-bench-serve-") as folder:
        catalog, row_bytes = fill_catalog(Path(folder), base, config)
        _say(f"{config.users} users with rows of {row_bytes:,} bytes")
        rooms = rooms_of(catalog, base.digest, slots=config.slots, host_bytes=config.host_bytes, terms=1)
        assert rooms is not None
        engine = Engine(base, load_tokenizer("byte"), rooms, shapes=shapes, waiting=1 << 20, waiting_per_tenant=1 << 20)
        engine.start(_say)
        compilations = CompilationCounter()
        client = Client(engine, Names(catalog, base.digest, "latest"))
        figures: Figures = {"users": config.users, "slots": config.slots, "row_bytes": row_bytes}
        done: list[Done] = []
        try:
            figures |= _decode(client, base, config, shapes, row_bytes, done)
            figures |= _zipf(client, config, done)
            figures |= _first_tokens(client, config, figures["resident_tokens_per_s"], done)
            figures |= _churn(client, engine, config, done)
        finally:
            engine.close()
            rooms.close()
        figures |= {
            "compilations_after_ready": compilations.count,
            "requests": len(done),
            "errors": sum(not one.well for one in done),
        }
        return figures


def _decode(client: Client, base: Base, config: BenchServeConfig, shapes: EngineShapes, row_bytes, done) -> Figures:
    """Tokens a second of as many distinct users as there are rows, against the base alone, in turns; and the ratio
    that bytes allow: what a step has to read without adapters over what it has to read with them."""
    rows = min(max(shapes.rows), config.slots)
    rng, rates = np.random.default_rng([config.seed, 1]), {"base": [], "users": []}
    length, new = config.prompt[0], config.decode_tokens
    for _ in range(config.decode_rounds + 1):  # the first round brings the users into their slots
        for kind in rates:
            models = ["base"] * rows if kind == "base" else [user_id(number) for number in range(rows)]
            began = time.perf_counter()
            done += (made := client.at_once(wishes(models, (length, length), (new, new), rng)))
            # From the first token on: prompts are another matter.
            first = max(one.first_s for one in made)
            rates[kind].append(rows * (new - 1) / (time.perf_counter() - began - first))
    figures = {f"{kind}_decode_tokens_per_s": float(np.median(found[1:])) for kind, found in rates.items()}
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(base.params))
    config_ = base.model.config
    width = 2 * config_.num_kv_heads * config_.head_dim * np.dtype(config_.dtype).itemsize * config_.num_layers
    cached = int(rows * (length + new / 2) * width)
    ratios = np.array(rates["users"][1:]) / np.array(rates["base"][1:])
    _say(f"decode: {figures}")
    return figures | {
        "decode_rows": rows,
        "decode_ratio": float(np.median(ratios)),
        "base_bytes": weights,
        "kv_bytes": cached,
        "adapter_bytes": rows * row_bytes,
        "allowed_ratio": (weights + cached) / (weights + cached + rows * row_bytes),
    }


def _zipf(client: Client, config: BenchServeConfig, done: list[Done]) -> Figures:
    """Tokens a second of a Zipf trace over all users, against one over as many as there are slots, in turns."""
    rng, rates = np.random.default_rng([config.seed, 2]), {"resident": [], "zipf": []}
    for _ in range(3):
        for kind, users in (("resident", config.slots), ("zipf", config.users)):
            numbers = zipf_users(config.trace // 3, users, config.zipf, rng)
            asked = wishes([user_id(number) for number in numbers], config.prompt, config.output, rng)
            began = time.perf_counter()
            done += (made := client.closed(asked, 2 * config.slots))
            rates[kind].append(sum(one.tokens for one in made) / (time.perf_counter() - began))
    _say(f"tokens/s: {rates}")
    resident, zipf = (float(np.median(rates[kind])) for kind in ("resident", "zipf"))
    ratio = float(np.median(np.array(rates["zipf"]) / np.array(rates["resident"])))
    return {"resident_tokens_per_s": resident, "zipf_tokens_per_s": zipf, "zipf_ratio": ratio}


def _first_tokens(client: Client, config: BenchServeConfig, capacity: float, done: list[Done]) -> Figures:
    """Seconds to the first token of warm users, at the same rate without and with cold users among them."""
    rng, waits = np.random.default_rng([config.seed, 3]), {"without": [], "with": []}
    rate = config.load * capacity / (sum(config.output) / 2)
    cold_users = iter(range(config.slots, config.users))
    warm = [user_id(number) for number in range(config.slots // 2)]
    client.closed(wishes(warm, config.prompt, (1, 1), rng), config.slots)
    for _ in range(2):
        for kind in waits:
            asked = wishes(rng.choice(warm, config.arrivals // 2).tolist(), config.prompt, config.output, rng, "warm")
            if kind == "with":
                for at in rng.choice(len(asked), round(config.cold * len(asked)), replace=False):
                    asked[at] = asked[at]._replace(model=user_id(next(cold_users)), tag="cold")
            done += (made := client.open(asked, rate, rng))
            waits[kind] += [one.first_s for one in made if one.tag == "warm"]
    p95 = {kind: float(np.percentile(found, 95)) for kind, found in waits.items()}
    _say(f"first tokens, p95: {p95}")
    return {
        "arrivals_per_s": rate,
        "ttft_p95_warm_s": p95["without"],
        "ttft_p95_warm_with_cold_s": p95["with"],
        "ttft_p95_warm_ratio": p95["with"] / p95["without"],
    }


def _churn(client: Client, engine: Engine, config: BenchServeConfig, done: list[Done]) -> Figures:
    """Short requests of all users: what the process has in memory does not grow, and nothing stays taken."""
    if not config.churn:
        return {}
    rng, memory = np.random.default_rng([config.seed, 4]), []
    began, parts = time.perf_counter(), 10
    for part in range(parts):
        numbers = zipf_users(config.churn // parts, config.users, config.zipf, rng)
        done += client.closed(wishes([user_id(n) for n in numbers], (4, 16), (1, 4), rng), 2 * config.slots)
        memory.append(resident_bytes())
        _say(f"{(part + 1) * config.churn // parts:,} of {config.churn:,} requests, {memory[-1] / 1e6:,.0f} MB")
    seconds = time.perf_counter() - began
    engine.wait_idle(60.0)
    state = engine.state()
    assert engine.rooms is not None
    held = [one for each in engine.rooms.residencies.values() for one in each.occupants() if one and one["held"]]
    return {
        "churn_requests_per_s": config.churn / seconds,
        "rss_growth": memory[-1] / memory[1] - 1,
        "pages_left": state.pages_total - state.pages_available,
        "slots_left": len(held),
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
