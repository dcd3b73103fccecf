"""The compiled steps of an engine: made before it is ready, and never after."""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popax.adapters.cohort import Cohort
from popax.errors import ConfigError
from popax.modeling.model import Model
from popax.modeling.paged import page_shapes
from popax.modeling.ragged import fits, ragged_page_shapes
from popax.serving.step import SlotSets, StepInputs, StepOutputs, StepShape, empty_inputs, serve_step
from popax.types import Params

COMPILATION = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineShapes:
    """What steps are compiled for. rows: of which the smallest that fits is used, the largest being how many answers
    run at once. groups of `width` prompt tokens each. context: tokens a sequence may have in all; contexts: fewer, for
    steps whose sequences are shorter (the context itself is always one of them). page: tokens of a page. pages: of all
    sequences together, None for as many as `rows` sequences of the whole context take."""

    rows: tuple[int, ...] = (8, 64)
    groups: int = 8
    width: int = 16
    context: int = 1024
    contexts: tuple[int, ...] = (256,)
    page: int = 16
    pages: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "rows", tuple(sorted(self.rows)))
        object.__setattr__(self, "contexts", tuple(sorted(self.contexts)))
        least = min((*self.rows, self.groups, self.width, self.context, self.page, *self.contexts), default=0)
        if not self.rows or least < 1 or self.context % self.page or any(each % self.page for each in self.contexts):
            raise ConfigError(f"{self}: all of them at least 1, and contexts multiples of page={self.page}")
        if max(self.contexts, default=0) > self.context:
            raise ConfigError(f"contexts={self.contexts}: none above context={self.context}")
        if self.num_pages * self.page < self.context:
            raise ConfigError(f"pages={self.pages} of {self.page} tokens: one sequence of {self.context} does not fit")

    @property
    def num_pages(self) -> int:
        return self.pages if self.pages is not None else max(self.rows) * (self.context // self.page)

    def all(self) -> list[StepShape]:
        """Every step that is compiled."""
        contexts = sorted({*self.contexts, self.context})
        return [
            StepShape(rows, groups, self.width, context // self.page)
            for rows in self.rows
            for groups in (0, self.groups)
            for context in contexts
        ]


class Programs:
    """`run` picks the smallest compiled step; an executable cannot compile again, whatever it is given."""

    def __init__(
        self,
        model: Model,
        params: Params,
        cohorts: tuple[Cohort, ...],
        shapes: EngineShapes,
        *,
        cache_dtype: str | None = None,
        mesh: Mesh | None = None,
    ):
        if shapes.context > model.config.max_seq_len:
            raise ConfigError(f"context={shapes.context}: the model's max_seq_len is {model.config.max_seq_len}")
        self.shapes, self._model, self._params, self._cohorts, self._mesh = shapes, model, params, cohorts, mesh
        self._options = shapes.all()
        self._compiled: dict[StepShape, jax.stages.Compiled] = {}
        self._empty: dict[StepShape, StepInputs] = {}
        self._kernel = mesh is None and jax.default_backend() == "tpu" and fits(model.config)
        sharding = _page_sharding(model, mesh)
        make = ragged_page_shapes if self._kernel else page_shapes
        wanted = [(like, sharding) for like in make(model.config, shapes.num_pages, shapes.page, cache_dtype)]
        if memory := max((cohort.memory for cohort in cohorts), default=0):
            shape = (model.config.num_layers, shapes.num_pages, shapes.page, memory)
            wanted.append((jax.ShapeDtypeStruct(shape, jnp.float32), self._everywhere))
        self._pages = tuple(
            jax.jit(functools.partial(jnp.zeros, like.shape, like.dtype), out_shardings=where)()
            for like, where in wanted
        )

    def compile(self, sets: tuple[SlotSets, ...], say: Callable[[str], None] = lambda line: None) -> None:
        """Make all steps. sets: as `run` will be given them, for their shapes."""
        for number, shape in enumerate(self._options):
            inputs = self._empty[shape] = empty_inputs(shape, self._model.config.vocab_size, self.shapes.context)
            with self._on_mesh():
                pages = tuple(each.sharding for each in self._pages)
                step = jax.jit(
                    serve_step,
                    static_argnums=(0, 1, 2, 3),
                    donate_argnums=5,
                    out_shardings=(pages, self._everywhere) if self._mesh is not None else None,
                )
                trimmed = _trimmed(sets, shape.samples)
                arguments = (
                    self._model,
                    shape,
                    self._cohorts,
                    self._kernel,
                    self._params,
                    self._pages,
                    trimmed,
                    inputs,
                )
                self._compiled[shape] = step.lower(*arguments).compile()
            say(f"step {number + 1} of {len(self._options)} compiled: {shape}")

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    @property
    def _everywhere(self) -> NamedSharding | None:
        return None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())

    def shape(self, rows: int, parts: int, pages: int) -> StepShape:
        """The smallest step with so many rows, groups, and pages of its longest sequence."""
        fits = (
            one for one in self._options if one.rows >= rows and one.pages >= pages and bool(one.groups) >= bool(parts)
        )
        return min(fits, key=lambda one: (one.tokens, one.pages))

    def inputs(self, shape: StepShape) -> StepInputs:
        """A step of nobody's tokens: what is the caller's is replaced, never written into."""
        return self._empty[shape]

    def run(self, shape: StepShape, sets: tuple[SlotSets, ...], inputs: StepInputs) -> StepOutputs:
        """One step; its outputs on the host."""
        with self._on_mesh():
            if self._mesh is not None:
                slots = [(each.slots, each.weights) for each in sets]
                slots, inputs = jax.device_put((slots, inputs), self._everywhere)
                sets = tuple(
                    each._replace(slots=own, weights=weights) for each, (own, weights) in zip(sets, slots, strict=True)
                )
            self._pages, outputs = self._compiled[shape](self._params, self._pages, sets, inputs)
        return jax.device_get(outputs)

    @property
    def page_bytes(self) -> int:
        """Of all pages."""
        return sum(each.nbytes for each in self._pages)

    @property
    def page_sharding(self) -> jax.sharding.Sharding:
        """Where pages lie."""
        return self._pages[0].sharding


class CompilationCounter:
    """How often this process compiled anything since it was made: jax tells every listener."""

    def __init__(self):
        self._count, self._lock = 0, threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILATION:
            with self._lock:
                self._count += 1

    @property
    def count(self) -> int:
        return self._count


def _trimmed(sets: Sequence[SlotSets], samples: int) -> tuple[SlotSets, ...]:
    nobody, ones = np.full(samples, -1, np.int32), np.ones(samples, np.float32)
    return tuple(each._replace(slots=(nobody,) * len(each.slots), weights=(ones,) * len(each.weights)) for each in sets)


def _page_sharding(model: Model, mesh: Mesh | None) -> NamedSharding | None:
    """Heads lie where their projections are; a latent is everybody's."""
    if mesh is None:
        return None
    heads = None if model.config.mla is not None else "kv_heads"
    return model.rules.sharding(("layers", None, heads, None, None), mesh)
