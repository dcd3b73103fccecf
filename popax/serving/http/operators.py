"""What the operators' page shows: one JSON of the whole server, and the page itself, which needs nothing else."""

import importlib.resources
from typing import Any

from popax.serving.http.service import Service
from popax.serving.pool import BASE_ONLY

PAGE = importlib.resources.files("popax.serving.http").joinpath("page.html").read_text(encoding="utf-8")
TOP_TENANTS = 10


def overview(service: Service) -> dict[str, Any]:
    """Slots and tiers, throughput, latencies, the busiest tenants. Numbers are totals: the page makes rates of them."""
    state = service.engine.state()
    rooms = service.engine.rooms
    return {
        "base": {"name": service.name, "digest": service.engine.base.digest, "model": BASE_ONLY},
        "running": state.running,
        "waiting": state.waiting,
        "preempted": state.preempted,
        "pages": {"held": state.pages_held, "total": state.pages_total, "available": state.pages_available},
        "prefixes": {"asked": state.pages.asked, "found": state.pages.found},
        "totals": {
            "steps": state.counters.steps,
            "step_s": state.counters.step_s,
            "prompt_tokens": state.counters.prompt_tokens,
            "new_tokens": state.counters.new_tokens,
            "requests": state.counters.requests,
            "ended": dict(state.counters.ended),
        },
        "latency": service.metrics.percentiles(),
        "tenants": service.metrics.top_tenants(TOP_TENANTS),
        "cohorts": [] if rooms is None else [_cohort(name, one) for name, one in rooms.residencies.items()],
    }


def _cohort(name: str, residency: Any) -> dict[str, Any]:
    counters = residency.counters()
    return {
        "id": name,
        "method": residency.stored.config.method,
        "rank": residency.stored.config.rank,
        "slots": residency.occupants(),
        "device": counters.device.__dict__,
        "host": counters.host.__dict__,
        "catalog": counters.catalog.__dict__,
    }
