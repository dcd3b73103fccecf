"""The places of a model where adapters may act."""

from collections.abc import Sequence

from popax.modeling.config import ModelConfig
from popax.modeling.quantised import VALUES, kernel_name
from popax.modeling.stacks import Stack, hidden_site, stack_sites
from popax.trees import flatten_named
from popax.types import EMBED, Params, SiteInfo


def site_infos(config: ModelConfig, stacks: Sequence[Stack], abstract: Params, axes: Params) -> dict[str, SiteInfo]:
    """By name, in the order of the forward pass; abstract, axes: of the model's parameters."""
    shapes, names = flatten_named(abstract), flatten_named(axes)
    found = {}

    def add(site: str, layers: int, first_layer: int) -> None:
        kernel = kernel_name(site)
        kernel = kernel if kernel in shapes else kernel + VALUES
        (d_in, d_out), own = shapes[kernel].shape[-2:], names[kernel][-2:]
        shape = {"d_in": d_in, "d_out": d_out, "axes": own}
        if "expert" in names[kernel]:
            shape["experts"] = shapes[kernel].shape[-3]
            shape["hidden_side"] = "in" if own[1] == "expert_ffw" else "out"
        found[site] = SiteInfo(name=site, layers=layers, first_layer=first_layer, **shape)

    found[EMBED] = SiteInfo(
        name=EMBED, d_in=config.vocab_size, d_out=config.embed_dim, layers=0, axes=("vocab", "embed"), kind="embedding"
    )
    for stack in stacks:
        for site in stack_sites(config, stack):
            add(site, stack.num_layers, stack.first_layer)
        found[hidden_site(stack)] = SiteInfo(
            name=hidden_site(stack),
            d_in=config.embed_dim,
            d_out=config.embed_dim,
            layers=stack.num_layers,
            axes=("embed", "embed"),
            first_layer=stack.first_layer,
            kind="hidden",
        )
    if not config.tied_embeddings:
        add("lm_head", 0, 0)
    return found
