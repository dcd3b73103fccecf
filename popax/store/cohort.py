"""What the catalog keeps once for all users whose adapters have the same form."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from popax.adapters.base import AdapterConfig, SiteSpec
from popax.store.layout import RowLayout, row_digest
from popax.store.records import canonical, text_digest
from popax.types import SiteInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredCohort:
    """Everything needed to read its users' rows without a base: the config, each site's ranks and scales, the layout.

    id: 128 bits of the digest of (config, base digest, layout), hex; kept as first written, whatever a later
    AdapterConfig adds. shared_digest: content address of the frozen arrays that all its users share (a method's, made
    from the base); None where the method has none. shared_layout: their packed form. record_digest: sha256 of the
    record as it was first written, which holds all of these; "" for a cohort that was not read from a catalog.
    """

    id: str
    config: AdapterConfig
    specs: Mapping[str, SiteSpec]
    base_digest: str
    layout: RowLayout
    shared_layout: RowLayout | None = None
    shared_digest: str | None = None
    record_digest: str = ""

    @classmethod
    def of(
        cls,
        config: AdapterConfig,
        specs: Mapping[str, SiteSpec],
        base_digest: str,
        layout: RowLayout,
        shared: Mapping[str, Any] | None = None,
    ) -> "StoredCohort":
        """The cohort as it would be registered. layout: of one user's adapter; shared: the arrays themselves."""
        shared_layout = RowLayout.of(shared) if shared else None
        return cls(
            id=cohort_id(config, base_digest, layout),
            config=config,
            specs=dict(specs),
            base_digest=base_digest,
            layout=layout,
            shared_layout=shared_layout,
            shared_digest=row_digest(shared_layout.pack(shared)) if shared_layout and shared else None,
        )

    @functools.cached_property
    def config_record(self) -> Mapping[str, Any]:
        """The config's plain JSON values, made once: every manifest that is read refers to it."""
        return self.config.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {
            "id": self.id,
            "config": self.config.to_dict(),
            "specs": specs_to_list(self.specs),
            "base_digest": self.base_digest,
            "layout": self.layout.to_dict(),
            "shared_layout": self.shared_layout and self.shared_layout.to_dict(),
            "shared_digest": self.shared_digest,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "StoredCohort":
        shared_layout = record["shared_layout"]
        return cls(
            id=record["id"],
            config=AdapterConfig.from_dict(record["config"]),
            specs=specs_from_list(record["specs"]),
            base_digest=record["base_digest"],
            layout=RowLayout.from_dict(record["layout"]),
            shared_layout=shared_layout and RowLayout.from_dict(shared_layout),
            shared_digest=record["shared_digest"],
            record_digest=text_digest(canonical(record)),
        )


def cohort_id(config: AdapterConfig, base_digest: str, layout: RowLayout) -> str:
    """128 bits of the digest of (config, base digest, layout), hex."""
    return text_digest(canonical(config.to_dict()), base_digest, layout.digest)[:32]


def specs_to_list(specs: Mapping[str, SiteSpec]) -> list[dict[str, Any]]:
    """Site specs as plain JSON values, in their order (the model's); `specs_from_list` reads them back."""
    return [
        {"info": dataclasses.asdict(spec.info), "ranks": list(spec.ranks), "scales": list(spec.scales)}
        for spec in specs.values()
    ]


def specs_from_list(records: list[dict[str, Any]]) -> dict[str, SiteSpec]:
    """The inverse of `specs_to_list`."""
    specs = {}
    for record in records:
        info = SiteInfo(**record["info"] | {"axes": tuple(record["info"]["axes"])})
        specs[info.name] = SiteSpec(info=info, ranks=tuple(record["ranks"]), scales=tuple(record["scales"]))
    return specs
