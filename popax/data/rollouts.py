"""What a model wrote, with what serving knew of it, and its way into packed rows that training replays."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from popax.data.packing import Document, fill_row, place, zero_batch
from popax.errors import DataError
from popax.modeling.model import Model
from popax.types import NOT_RECORDED, ROUTE_DTYPE, Rollouts


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RolloutRecord:
    """One row of a generation: the prompt, what was sampled after it, and the end token where it came.

    tokens_T: int32. prompt_length: how many of them were given. logps_T: float32, log p(token t | the tokens before it)
    by the model's own distribution, before temperature and truncation; NaN in the prompt. routes_TxLxK: int16, the
    experts that token t went to in each of L mixtures, NOT_RECORDED where unknown; 2 L K bytes a token. num_experts:
    among how many. Raises DataError where these do not fit together.
    """

    tokens_T: np.ndarray
    prompt_length: int
    logps_T: np.ndarray
    routes_TxLxK: np.ndarray
    num_experts: int

    def __post_init__(self):
        length = len(self.tokens_T)
        if self.routes_TxLxK.ndim != 3 or not length == len(self.logps_T) == len(self.routes_TxLxK):
            raise DataError(
                f"a record of {length} tokens has log-probabilities {self.logps_T.shape} and routes "
                f"{self.routes_TxLxK.shape}: one of each for every token, routes as [T, L, K]"
            )
        if not 1 <= self.prompt_length <= length:
            raise DataError(f"a record of {length} tokens has prompt_length={self.prompt_length}: 1 to {length}")
        low, high = self.routes_TxLxK.min(initial=0), self.routes_TxLxK.max(initial=NOT_RECORDED)
        if low < NOT_RECORDED or high >= self.num_experts:
            raise DataError(
                f"a record holds experts {low} to {high} of num_experts={self.num_experts}: 0 to {self.num_experts - 1}"
                f", or {NOT_RECORDED} where a token has no record"
            )

    def rollout(self, advantage: float) -> "Rollout":
        """The recorded tokens themselves, to be learnt from."""
        return Rollout(self.tokens_T, self.prompt_length, advantage, self)


class Rollout(NamedTuple):
    """A text to learn from: int32 [T], of which the first prompt_length were given, and the advantage of the rest.

    record: of the generation it came from, None where there is none. The text may differ from it (tokenised again,
    edited): what is recorded counts up to the first token that differs.
    """

    ids_T: np.ndarray
    prompt_length: int
    advantage: float
    record: RolloutRecord | None


def pack_rollouts(model: Model, rollouts: Sequence[Rollout], seq_len: int, *, rows: int | None = None) -> Rollouts:
    """Rows [M, seq_len] as `pack_documents` makes them, weight 1 on what was not given, with routes for this model.

    rows: exactly so many, the last ones padding; by default as many as are needed. A record of a model with other
    mixtures maps no token. target_bytes are 0: sampled tokens are not scored by the byte. Raises DataError for a
    rollout that has nothing sampled, does not fit in a row (cut, it would have another context than it was written in),
    or has an advantage that is not finite, and for more rollouts than `rows` hold.
    """
    for index, rollout in enumerate(rollouts):
        _check(index, rollout, seq_len)
    placed = place([len(rollout.ids_T) - 1 for rollout in rollouts], seq_len)
    if rows is not None and len(placed) > rows:
        raise DataError(f"{len(rollouts)} rollouts fill {len(placed)} rows of {seq_len}, not rows={rows}: raise rows")
    shape = (len(placed) if rows is None else rows, seq_len)
    packed = _unrecorded(model, shape)
    for row, members in enumerate(placed):
        fill_row(packed.batch, row, [_document(rollouts[member]) for member in members])
        start = 0
        for member in members:
            end = start + len(rollouts[member].ids_T) - 1
            _fill_record(packed, row, slice(start, end), rollouts[member], model)
            start = end
    return packed


def _unrecorded(model: Model, shape: tuple[int, int]) -> Rollouts:
    routes = np.full((*shape, *model.routes_shape), NOT_RECORDED, ROUTE_DTYPE)
    leaves = [zero_batch(*shape), routes, np.full(shape, np.nan, np.float32), np.zeros(shape, np.float32)]
    return Rollouts._make(leaves)


def _check(index: int, rollout: Rollout, seq_len: int) -> None:
    length = len(rollout.ids_T)
    if not 1 <= rollout.prompt_length < length:
        raise DataError(
            f"rollout {index} has {length} tokens of which {rollout.prompt_length} were given: at least one of each"
        )
    if length - 1 > seq_len:
        raise DataError(f"rollout {index} makes {length - 1} predictions, a row has seq_len={seq_len}: raise seq_len")
    if not math.isfinite(rollout.advantage):
        raise DataError(f"rollout {index} has advantage={rollout.advantage}: a finite number")


def _document(rollout: Rollout) -> Document:
    length = len(rollout.ids_T)
    weights = (np.arange(length) >= rollout.prompt_length).astype(np.float32)
    return Document(np.asarray(rollout.ids_T, np.int32), weights, np.zeros(length, np.int32))


def _fill_record(packed: Rollouts, row: int, at: slice, rollout: Rollout, model: Model) -> None:
    np.asarray(packed.advantages_BxT)[row, at] = rollout.advantage
    record, moe = rollout.record, model.config.moe
    if record is None or (*record.routes_TxLxK.shape[1:], record.num_experts) != (
        *model.routes_shape,
        moe.num_experts if moe else 0,
    ):
        return
    # A token's route and probability depend on all tokens before it: the record ends where the texts part.
    length = min(len(rollout.ids_T), len(record.tokens_T))
    parted = np.flatnonzero(np.asarray(rollout.ids_T[:length]) != record.tokens_T[:length])
    same = int(parted[0]) if parted.size else length
    inputs = min(same, len(rollout.ids_T) - 1)
    np.asarray(packed.routes_BxTxLxK)[row, at.start : at.start + inputs] = record.routes_TxLxK[:inputs]
    np.asarray(packed.serve_logps_BxT)[row, at.start : at.start + max(same - 1, 0)] = record.logps_T[1:same]
