"""A base with a byte tokenizer, a catalog of 64 users of six cohorts, and what each of them says alone."""

import dataclasses
import queue
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from popax.adapters.apply import bind
from popax.adapters.base import AdapterConfig, TargetRule
from popax.adapters.cohort import Cohort
from popax.data.tokenize import Tokenizer, load_tokenizer
from popax.modeling.base import Base, new_base
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.serving.engine import Engine
from popax.serving.generate import generate
from popax.serving.programs import EngineShapes
from popax.serving.request import Event, GenerationRequest, Term
from popax.serving.rooms import rooms_of
from popax.store import Catalog, RowLayout
from popax.types import NO_ADAPT

CONFIG = ModelConfig(
    vocab_size=264, embed_dim=32, ffw_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_seq_len=128
)
ATTENTION = (TargetRule(pattern=r"layers\.attn\.[qv]_proj"),)
COHORTS = (
    AdapterConfig(rank=3, alpha=3.0, targets=(r"layers\..*_proj", "lm_head")),
    AdapterConfig(rank=8, alpha=8.0, targets=ATTENTION),
    AdapterConfig(method="lora_xs", rank=4, alpha=4.0, targets=(r"layers\..*_proj",)),
    AdapterConfig(rank=1, alpha=2.0, targets=(r"layers\.mlp\..*",)),
    AdapterConfig(method="prompt", rank=3),
    AdapterConfig(method="delta_mem", rank=3, options={"segment": 2, "states": 2}),
)
SHAPES = EngineShapes(rows=(16,), groups=4, width=8, context=128, contexts=(), page=8)


@dataclasses.dataclass(frozen=True)
class World:
    base: Base
    tokenizer: Tokenizer
    catalog: Catalog
    users: tuple[str, ...]

    @classmethod
    def make(cls, place, users: int = 64, cohorts=COHORTS) -> "World":
        model = Model(CONFIG)
        base = new_base(model, model.init(jax.random.key(0)), source="random weights")
        catalog, rng = Catalog.open(place, create=True), np.random.default_rng(0)
        names = tuple(f"{'acme' if at % 2 else 'zeta'}/user-{at}" for at in range(users))
        world = cls(base, load_tokenizer("byte"), catalog, names)
        for at, user in enumerate(names):
            world.commit(user, cohorts[at % len(cohorts)], rng)
        return world

    def commit(self, user: str, config: AdapterConfig, rng: np.random.Generator, promote: bool = True):
        """A loud adapter, and its manifest."""
        cohort = Cohort.of(config, self.base.model.sites())
        shared = cohort.shared(lambda site: self.base.model.site_weight(self.base.params, site))
        layout = RowLayout.of(cohort.abstract())
        stored = self.catalog.find_cohort(config, self.base.digest, layout) or self.catalog.cohort(
            config, cohort.specs, self.base.digest, layout, shared or None
        )
        loud = lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(leaf.dtype)  # noqa: E731
        manifest = self.catalog.commit(stored, user, jax.tree.map(loud, cohort.abstract()))
        if promote:
            self.catalog.promote(user, manifest.revision)
        return manifest

    def manifest(self, user: str, revision=None):
        return self.catalog.resolve([(user, revision)])[0]

    def alone(self, prompt, count: int, user: str | None = None, revision=None, **options) -> list[int]:
        """What `generate` says of this user's adapter by itself."""
        adapt = NO_ADAPT
        if user is not None:
            adapter, manifest = self.catalog.load(user, revision)
            stored = self.catalog.cohort_of(manifest)
            cohort = Cohort(stored.config, tuple(stored.specs.values()))
            arrays = jax.tree.map(jnp.asarray, (adapter, self.catalog.shared(stored)))
            adapt = bind(cohort, *arrays)
        [row] = generate(self.base.model, self.base.params, [prompt], adapt=adapt, max_new_tokens=count, **options)
        return row.tokens.tolist()

    def logps(self, tokens, user: str) -> np.ndarray:
        """log p [T, V] of what follows each token, of the whole text at once."""
        adapter, manifest = self.catalog.load(user)
        stored = self.catalog.cohort_of(manifest)
        cohort = Cohort(stored.config, tuple(stored.specs.values()))
        adapt = bind(cohort, *jax.tree.map(jnp.asarray, (adapter, self.catalog.shared(stored))))
        x_BxTxD, _ = self.base.model.hidden(self.base.params, jnp.asarray([tokens], jnp.int32), adapt=adapt)
        return np.asarray(jax.nn.log_softmax(self.base.model.logits(self.base.params, x_BxTxD, adapt=adapt))[0])

    def engine(self, *, shapes: EngineShapes = SHAPES, slots: int = 64, host_bytes: int = 1 << 22, **options) -> Engine:
        rooms = rooms_of(self.catalog, self.base.digest, slots=slots, host_bytes=host_bytes, terms=2)
        engine = Engine(self.base, self.tokenizer, rooms, shapes=shapes, **options)
        engine.start()
        return engine

    def terms(self, *names: str | tuple[str, float]) -> tuple[Term, ...]:
        pairs = [(name, 1.0) if isinstance(name, str) else name for name in names]
        return tuple(Term(self.manifest(user, "promoted"), weight) for user, weight in pairs)


class Told(NamedTuple):
    """All events of one answer."""

    events: list[Event]

    @property
    def tokens(self) -> list[int]:
        return [record.token for event in self.events for record in event.tokens]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def records(self):
        return [record for event in self.events for record in event.tokens]

    @property
    def last(self) -> Event:
        return self.events[-1]


class Listener:
    """Collects the events of one answer."""

    def __init__(self, engine: Engine, request: GenerationRequest):
        self._events: queue.Queue[Event] = queue.Queue()
        self.seen: list[Event] = []
        self.answer = engine.submit(request, self._events.put)

    def next(self, timeout_s: float = 60.0) -> Event:
        self.seen.append(self._events.get(timeout=timeout_s))
        return self.seen[-1]

    def all(self) -> Told:
        while not self.seen or self.seen[-1].reason is None:
            self.next()
        return Told(self.seen)


def ask(engine: Engine, prompt, **options) -> Told:
    """One request, and its end."""
    return Listener(engine, GenerationRequest(tokens=tuple(prompt), **options)).all()


def together(engine: Engine, requests) -> list[Listener]:
    """All of them in the engine's hands before it looks at one."""
    gate, stands = threading.Event(), threading.Event()
    engine.call(lambda: (stands.set(), gate.wait()))
    assert stands.wait(60.0)
    listeners = [Listener(engine, request) for request in requests]
    gate.set()
    return listeners


def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()
