"""What the backward pass computes again instead of reading it from memory (rematerialisation), chosen by name."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from popax.errors import ConfigError

Remat = Literal["none", "projections", "attention", "full"]

# Of each layer, beside its input: the kinds of linear maps whose outputs, adapters included, are kept; None keeps all.
# From what is kept no base weight is needed to make the rest again, which is norms, scores, activations and the
# adapters' inner products; what is not kept costs its maps a second time.
KEPT: dict[Remat, tuple[str, ...] | None] = {
    "none": None,
    "projections": ("attn", "mlp", "moe"),
    "attention": ("attn",),
    "full": (),
}


def check_remat(remat: Any, owner: str) -> None:
    """Raises ConfigError where it is no policy's name."""
    if remat not in KEPT or not isinstance(remat, str):
        raise ConfigError(
            f"{owner}.remat={remat!r}: one of {', '.join(map(repr, KEPT))}; 'full' keeps the layers' inputs only, "
            "'none' keeps everything"
        )


def named_projection(y: jax.Array, site: str) -> jax.Array:
    """y itself, known to the policies as an output of the site's kind: "attn" of layers.attn.q_proj."""
    _, _, inside = site.partition(".")
    return checkpoint_name(y, inside.partition(".")[0]) if inside else y


def rematerialised(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The layer, of which the backward pass keeps what the policy says. Raises ConfigError on another name."""
    check_remat(remat, "forward")
    kept = KEPT[remat]
    if kept is None:
        return layer
    # Under a scan nothing is shared between the passes that the compiler could undo this with.
    return jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*kept), prevent_cse=False)
