"""Cross-entropy under a frozen head, without its logits: nats_m = logsumexp_v(x_m . w_v) - x_m . w_target(m)."""

from popax.kernels.cross_entropy.api import token_nll

__all__ = ["token_nll"]
