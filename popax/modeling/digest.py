"""A name for a base's weights that does not depend on how they are split, placed or loaded."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from popax.modeling.config import ModelConfig
from popax.modeling.quantise_rules import QuantiseRules
from popax.trees import flatten_named
from popax.types import Params


class TensorRecord(NamedTuple):
    """One tensor's contribution: sha256 is of its bytes in C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


def digest_records(records: Iterable[TensorRecord], config: ModelConfig | None) -> str:
    """sha256, in hex, over the tensors sorted by name and what of the config changes the function they compute."""
    content = {
        "semantics": None if config is None else config.semantics(),
        "tensors": [[name, dtype, list(shape), sha256] for name, dtype, shape, sha256 in sorted(records)],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_params(params: Params, config: ModelConfig | None = None) -> str:
    """`digest_records` of parameters in memory, wherever their shards lie.

    One layer of one parameter is on the host at a time. Give the config where models of other semantics (another RoPE,
    say) could have equal weights.
    """
    return digest_records((_record(name, leaf) for name, leaf in flatten_named(params).items()), config)


def digest_quantised(digest: str, rules: QuantiseRules) -> str:
    """The digest of the base of this digest once it is quantised by these rules, which say all about the rounding."""
    content = {"base": digest, "quantise": dataclasses.asdict(rules)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _record(name: str, leaf) -> TensorRecord:
    digest = hashlib.sha256()
    for part in leaf if leaf.ndim > 2 else (leaf,):
        digest.update(np.ascontiguousarray(np.asarray(part)).view(np.uint8).data)
    return TensorRecord(name, str(leaf.dtype), tuple(leaf.shape), digest.hexdigest())
