"""The gate between a candidate and what is served: thresholds, and a verdict that says what was too little."""

import dataclasses
import math
from typing import Any, NamedTuple

from popax.errors import ConfigError
from popax.store.scores import Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What a revision must reach to be served.

    min_gain: bits per byte saved on the user's held-out text. min_bytes: of that text; less says nothing.
    max_retention_loss: bits per byte lost on the text that the base knew; None asks for no such text. max_norm: of the
    weight updates, over that of the weights.
    """

    min_gain: float = 0.0
    min_bytes: int = 256
    max_retention_loss: float | None = 0.05
    max_norm: float = 0.5

    def __post_init__(self):
        if self.min_bytes < 1 or self.max_norm <= 0 or math.isnan(self.min_gain):
            raise ConfigError(
                f"GateConfig(min_gain={self.min_gain}, min_bytes={self.min_bytes}, max_norm={self.max_norm}): at least "
                "one byte, a positive norm, and a number"
            )


class Verdict(NamedTuple):
    """reasons: each value that fell short, beside its threshold; none where the revision passes."""

    passed: bool
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"passed": self.passed, "reasons": list(self.reasons)}


def judge(scores: Scores, gate: GateConfig) -> Verdict:
    """Whether the scores reach the gate. What is not a finite number never does."""
    loss, gain = scores.retention_loss, scores.gain
    checks = [
        # A gain of exactly the threshold is not above it: an adapter that does nothing is not promoted by the default.
        (math.isfinite(gain) and gain > gate.min_gain, f"gain {gain:.4f} bits per byte is not above {gate.min_gain:g}"),
        (scores.target_bytes >= gate.min_bytes, f"{scores.target_bytes} bytes of text are fewer than {gate.min_bytes}"),
        (
            math.isfinite(scores.norm) and scores.norm <= gate.max_norm,
            f"norm {scores.norm:.4f} of the weights' own exceeds {gate.max_norm:g}",
        ),
    ]
    if gate.max_retention_loss is not None and loss is None:
        checks.append((False, "it was scored without a retention text (max_retention_loss=None asks for none)"))
    elif gate.max_retention_loss is not None and loss is not None:
        within = math.isfinite(loss) and loss <= gate.max_retention_loss
        checks.append((within, f"retention loss {loss:.4f} bits per byte exceeds {gate.max_retention_loss:g}"))
    reasons = tuple(reason for passed, reason in checks if not passed)
    return Verdict(not reasons, reasons)
