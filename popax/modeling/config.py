"""The shape and arithmetic of a decoder of the Llama, Qwen or DeepSeek families. Presets are in configs/models."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from popax.errors import ConfigError
from popax.modeling.block_config import MLAConfig, MoEConfig, check_keys, check_whole, from_mapping
from popax.modeling.quantise_rules import QuantiseRules, as_rules

RopeLayout = Literal["half", "interleaved"]
DTYPES = ("float32", "bfloat16")
COUNTS = (
    "vocab_size",
    "embed_dim",
    "ffw_dim",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_seq_len",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope:
    """Positions divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float

    def __post_init__(self):
        _check_factor(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1: wavelengths above original_max_seq_len / low_freq_factor are stretched by `factor`, those below
    original_max_seq_len / high_freq_factor are kept, and those between are interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self):
        _check_factor(self)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"low_freq_factor={self.low_freq_factor}, high_freq_factor={self.high_freq_factor}: "
                "the low one must be above 0 and below the high one"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRope:
    """YaRN (arXiv 2309.00071): dimensions that turn more than beta_fast times in the original context are kept,
    those that turn less than beta_slow times are stretched by `factor`; cos and sin are multiplied by
    attention_factor (default 0.1 ln(factor) + 1, or the ratio of that with mscale and with mscale_all_dim)."""

    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        _check_factor(self)
        if not 0 < self.beta_slow <= self.beta_fast:
            raise ConfigError(f"beta_slow={self.beta_slow}, beta_fast={self.beta_fast}: 0 < beta_slow <= beta_fast")


RopeScaling = LinearRope | Llama3Rope | YarnRope
ROPE_SCALINGS: dict[str, type] = {"linear": LinearRope, "llama3": Llama3Rope, "yarn": YarnRope}


def _check_factor(rope: Any) -> None:
    if not (math.isfinite(rope.factor) and rope.factor >= 1.0):
        raise ConfigError(f"{type(rope).__name__}.factor={rope.factor}: a finite number of at least 1")
    original = getattr(rope, "original_max_seq_len", 1)
    if original < 1:
        raise ConfigError(f"{type(rope).__name__}.original_max_seq_len={original}: at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything static about a base model; hashable, so it may be a jit argument.

    rope_scaling: one of the scalings, or a mapping of its fields and {"rope_type": "linear" | "llama3" | "yarn"}.
    rope_layout: which features rotate together: i and i + head_dim/2 ("half", Hugging Face) or 2i and 2i+1
    ("interleaved", the original Llama). attention_bias: biases on q, k and v; output_bias: on o. qk_norm: RMS norms
    over head_dim on q and k before RoPE (Qwen3). moe: mixtures of experts in place of the dense MLPs. mla: latent
    attention; head_dim is then that of a query, nope and rope features together. Both may be mappings of their fields.
    quantise: weights that are kept in fewer bits, as QuantiseRules or in a word (int8, fp8, int4, int4:64); such a base
    cannot be trained. dtype: of activations and matmuls; norms, RoPE, softmax and logits are float32. param_dtype: of
    the other stored weights.
    """

    vocab_size: int
    embed_dim: int
    ffw_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    rope_layout: RopeLayout = "half"
    norm_eps: float = 1e-5
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    max_seq_len: int = 2048
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None
    quantise: QuantiseRules | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        check_whole(self, 1, *COUNTS)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every kv head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim}: RoPE rotates pairs, so it must be even")
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 1):
            raise ConfigError(f"rope_theta={self.rope_theta}: a finite number above 1")
        if not (math.isfinite(self.norm_eps) and self.norm_eps > 0):
            raise ConfigError(f"norm_eps={self.norm_eps}: a finite number above 0")
        object.__setattr__(self, "rope_scaling", _as_rope_scaling(self.rope_scaling))
        object.__setattr__(self, "quantise", as_rules(self.quantise))
        self._check_blocks()
        if self.rope_layout not in ("half", "interleaved"):
            raise ConfigError(f"rope_layout={self.rope_layout!r}: 'half' or 'interleaved'")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ConfigError(f"ModelConfig.{name}={getattr(self, name)!r}: one of {', '.join(DTYPES)}")

    def _check_blocks(self) -> None:
        if self.moe is not None:
            object.__setattr__(self, "moe", moe := from_mapping(MoEConfig, self.moe, "moe"))
            if moe.first_dense_layers >= self.num_layers:
                raise ConfigError(
                    f"first_dense_layers={moe.first_dense_layers} of num_layers={self.num_layers}: no layer is left "
                    "for the experts; a dense model has moe=None"
                )
        if self.mla is not None:
            object.__setattr__(self, "mla", mla := from_mapping(MLAConfig, self.mla, "mla"))
            if self.head_dim != mla.nope_head_dim + mla.rope_head_dim or self.num_kv_heads != self.num_heads:
                raise ConfigError(
                    f"head_dim={self.head_dim}, num_kv_heads={self.num_kv_heads}: with mla they are nope_head_dim + "
                    f"rope_head_dim = {mla.nope_head_dim + mla.rope_head_dim} and num_heads = {self.num_heads}"
                )
            if self.qk_norm:
                raise ConfigError("qk_norm is of grouped-query attention: with mla the latents are normalised")

    @property
    def rope_dim(self) -> int:
        """Features of a head that turn with the position."""
        return self.head_dim if self.mla is None else self.mla.rope_head_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back. Without moe, mla and quantise where they are None."""
        # A dense model's record, and with it the digest, is what it was before there were others.
        fields, added = dataclasses.asdict(self).items(), ("moe", "mla", "quantise")
        record: dict[str, Any] = {key: value for key, value in fields if value is not None or key not in added}
        if self.rope_scaling is not None:
            kind = next(name for name, cls in ROPE_SCALINGS.items() if isinstance(self.rope_scaling, cls))
            record["rope_scaling"] = {"rope_type": kind, **record["rope_scaling"]}
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "ModelConfig":
        """Raises ConfigError on a key that no ModelConfig has, and on one that is missing."""
        values = dict(record)
        check_keys(cls, values, "ModelConfig")
        return cls(**values)

    def semantics(self) -> dict[str, Any]:
        """`to_dict` without what does not change the function that the weights compute: dtypes and max_seq_len."""
        return {k: v for k, v in self.to_dict().items() if k not in ("dtype", "param_dtype", "max_seq_len")}


def _as_rope_scaling(rope: Any) -> RopeScaling | None:
    """The scaling itself, or made of a mapping, as gin and JSON give it."""
    if isinstance(rope, Mapping):
        values = dict(rope)
        kind = values.pop("rope_type", None)
        if kind not in ROPE_SCALINGS:
            raise ConfigError(f"rope_scaling: rope_type={kind!r}; one of {', '.join(ROPE_SCALINGS)}")
        check_keys(ROPE_SCALINGS[kind], values, "rope_scaling")
        return ROPE_SCALINGS[kind](**values)
    if rope is not None and not isinstance(rope, RopeScaling):
        raise ConfigError(f"rope_scaling={rope!r}: None, LinearRope, Llama3Rope or YarnRope")
    return rope
