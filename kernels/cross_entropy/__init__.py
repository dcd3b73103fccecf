"""Cross-entropy under a frozen head, without its logits: nats_m = logsumexp_v(x_m . w_v) - x_m . w_target(m)."""

from popax.kernels.cross_entropy.api import target_nats

__all__ = ["target_nats"]
