"""What Prometheus reads: the engine's counters as they are, and times that only who listens can measure.

Labels are bounded: the first so many tenants and adapters have series of their own, all later ones share `other`.
"""

import collections
from collections.abc import Iterator

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from popax.serving.engine import Engine
from popax.serving.request import Answer, Event, GenerationRequest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TENANTS, ADAPTERS = 64, 256
RECENT = 2048
OTHER = "other"


class Metrics:
    """One registry a server, not the process's."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        options = {"registry": self.registry, "buckets": SECONDS}
        self.ttft = Histogram("popax_time_to_first_token_seconds", "From asking to the first token.", **options)
        self.gap = Histogram("popax_inter_token_seconds", "Between two tokens of an answer.", **options)
        self.queue = Histogram("popax_queue_seconds", "From asking to being admitted.", **options)
        self.whole = Histogram("popax_answer_seconds", "From asking to the last token.", **options)
        labels = {"labelnames": ("tenant",), "registry": self.registry}
        self.requests = Counter("popax_requests", "Answers that were asked for.", **labels)
        self.tokens = Counter("popax_tokens", "New tokens.", **labels)
        adapters = {"labelnames": ("adapter",), "registry": self.registry}
        self.adapter_requests = Counter(
            "popax_adapter_requests", "Answers by adapter, summands counted each.", **adapters
        )
        self._tenants, self._adapters = _Labels(TENANTS), _Labels(ADAPTERS)
        self._last: dict[Answer, float] = {}
        self._recent = {
            name: collections.deque(maxlen=RECENT) for name in ("first token", "between tokens", "queue", "answer")
        }
        self._of_tenant: collections.Counter[str] = collections.Counter()
        self._tokens_of: collections.Counter[str] = collections.Counter()
        self.registry.register(_EngineCollector(engine))

    def asked(self, request: GenerationRequest) -> None:
        """A request was taken."""
        tenant = self._tenants.of(request.tenant)
        self.requests.labels(tenant).inc()
        self._of_tenant[tenant] += 1
        for term in request.terms:
            self.adapter_requests.labels(self._adapters.of(term.manifest.user)).inc()

    def told(self, answer: Answer, event: Event) -> None:
        """An event of an answer has come."""
        timing = answer.timing
        if event.tokens:
            tenant = self._tenants.of(answer.request.tenant)
            self.tokens.labels(tenant).inc(len(event.tokens))
            self._tokens_of[tenant] += len(event.tokens)
            if answer not in self._last:
                self._observe(self.ttft, "first token", timing.first - timing.arrived)
                self._observe(self.queue, "queue", timing.admitted - timing.arrived)
            else:
                self._observe(self.gap, "between tokens", event.time - self._last[answer])
            self._last[answer] = event.time
        if event.reason is not None:
            self._last.pop(answer, None)
            self._observe(self.whole, "answer", event.time - timing.arrived)

    def percentiles(self) -> dict[str, dict[str, float | None]]:
        """Seconds, of the last RECENT of each kind; None before the first."""

        def of(values: list[float]) -> dict[str, float | None]:
            return {f"p{at}": float(np.percentile(values, at)) if values else None for at in (50, 95, 99)}

        return {name: of(list(values)) for name, values in self._recent.items()}

    def top_tenants(self, count: int) -> list[dict[str, object]]:
        """Those with the most new tokens."""
        return [
            {"tenant": tenant, "requests": self._of_tenant[tenant], "tokens": tokens}
            for tenant, tokens in self._tokens_of.most_common(count)
        ]

    def _observe(self, histogram: Histogram, name: str, seconds: float) -> None:
        histogram.observe(max(0.0, seconds))
        self._recent[name].append(max(0.0, seconds))

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)


class _Labels:
    def __init__(self, most: int):
        self._most, self._known = most, set()

    def of(self, value: str) -> str:
        if value not in self._known:
            if len(self._known) >= self._most:
                return OTHER
            self._known.add(value)
        return value or "-"


class _EngineCollector:
    """Reads the engine when it is asked, so that no number is kept twice."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        state = self._engine.state()
        counters = state.counters
        yield GaugeMetricFamily("popax_running", "Answers in the batch.", value=state.running)
        yield GaugeMetricFamily("popax_waiting", "Requests in the queue.", value=state.waiting)
        yield GaugeMetricFamily("popax_pages", "Pages of the KV cache.", value=state.pages_total)
        yield GaugeMetricFamily("popax_pages_held", "Pages that answers hold.", value=state.pages_held)
        yield CounterMetricFamily("popax_steps", "Steps of the engine.", value=counters.steps)
        yield CounterMetricFamily("popax_step_seconds", "Time in steps.", value=counters.step_s)
        yield CounterMetricFamily(
            "popax_prompt_tokens", "Prompts' tokens that were computed.", value=counters.prompt_tokens
        )
        yield CounterMetricFamily("popax_new_tokens", "Tokens that were sampled.", value=counters.new_tokens)
        yield CounterMetricFamily("popax_prefix_tokens_asked", "Tokens looked up as prefixes.", value=state.pages.asked)
        yield CounterMetricFamily("popax_prefix_tokens_found", "Tokens found as prefixes.", value=state.pages.found)
        yield CounterMetricFamily("popax_preempted", "Answers that waited again for pages.", value=state.preempted)
        ended = CounterMetricFamily("popax_ended", "Answers that are over.", labels=["reason"])
        for reason, count in counters.ended.items():
            ended.add_metric([reason], count)
        yield ended
        if self._engine.rooms is not None:
            yield from self._residency(self._engine.rooms.residencies)

    def _residency(self, residencies) -> Iterator[Metric]:
        names = ("hits", "misses", "evictions", "bytes_in")
        tiers = {
            name: CounterMetricFamily(f"popax_residency_{name}", f"{name} of a tier.", labels=["cohort", "tier"])
            for name in names
        }
        slots = GaugeMetricFamily("popax_slots", "Device slots.", labels=["cohort", "state"])
        loads = CounterMetricFamily("popax_loads", "Revisions read from the catalog.", labels=["cohort"])
        for cohort, residency in residencies.items():
            counters, slots_now = residency.counters(), residency.occupants()
            held = sum(one is not None and one["held"] for one in slots_now)
            for name, family in tiers.items():
                family.add_metric([cohort, "device"], getattr(counters.device, name))
                family.add_metric([cohort, "host"], getattr(counters.host, name))
            slots.add_metric([cohort, "free"], len(slots_now) - held)
            slots.add_metric([cohort, "held"], held)
            loads.add_metric([cohort], counters.catalog.loads)
        yield from (*tiers.values(), slots, loads)
