"""What `popax serve` is configured by, beside the shapes of its steps."""

import dataclasses

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.data.tokenize import Tokenizer
from popax.errors import ConfigError
from popax.modeling.base import Base
from popax.serving.engine import Engine
from popax.serving.programs import EngineShapes
from popax.serving.rooms import rooms_of
from popax.store.catalog import Catalog


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """slots: adapters of each cohort on the device. host_bytes: of each cohort's rows in host memory. terms: adapters
    of one cohort that a request may sum. waiting, waiting_per_tenant: requests in the queue. cache_dtype: of keys and
    values, None for the model's. drain_s: how long answers may run on after SIGTERM. max_body, body_timeout_s,
    open_requests: limits on what a client sends."""

    slots: int = 64
    host_bytes: int = 1 << 28
    terms: int = 2
    waiting: int = 1024
    waiting_per_tenant: int = 256
    cache_dtype: str | None = None
    drain_s: float = 60.0
    max_body: int = 4 << 20
    body_timeout_s: float = 30.0
    open_requests: int = 4096

    def __post_init__(self):
        least = {"slots": 1, "host_bytes": 0, "terms": 1, "waiting": 1, "waiting_per_tenant": 1, "drain_s": 0}
        least |= {"max_body": 1, "body_timeout_s": 0.001, "open_requests": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"ServeConfig.{name}={getattr(self, name)}: at least {bound}")


def open_engine(
    base: Base,
    tokenizer: Tokenizer,
    catalog: Catalog | None,
    config: ServeConfig,
    shapes: EngineShapes,
    *,
    mesh: Mesh | None = None,
) -> Engine:
    """An engine for every cohort of the catalog that was made for this base; `start` makes it ready."""
    sharding: jax.sharding.Sharding | None = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    options = {"slots": config.slots, "host_bytes": config.host_bytes, "terms": config.terms, "sharding": sharding}
    rooms = rooms_of(catalog, base.digest, **options)
    waiting = {"waiting": config.waiting, "waiting_per_tenant": config.waiting_per_tenant}
    return Engine(base, tokenizer, rooms, shapes=shapes, cache_dtype=config.cache_dtype, mesh=mesh, **waiting)


def described(engine: Engine) -> str:
    """One line for people: what is served, and what of."""
    cohorts = engine.rooms.cohorts if engine.rooms else ()
    kinds = ", ".join(f"{one.config.method} rank {one.config.rank}" for one in cohorts) or "the base alone"
    megabytes = engine.programs.page_bytes / 1e6
    return f"{kinds}; {engine.shapes.num_pages} pages of {engine.shapes.page} tokens, {megabytes:,.0f} MB"
