"""Rollouts in packed rows: what maps to a record, what does not, and what is refused."""

import numpy as np
import pytest

from popax.data.rollouts import Rollout, RolloutRecord, pack_rollouts
from popax.errors import DataError
from popax.modeling.block_config import MoEConfig
from popax.modeling.config import ModelConfig
from popax.modeling.model import Model
from popax.types import NOT_RECORDED


def moe_model(**changes) -> Model:
    moe = MoEConfig(
        **{"num_experts": 8, "experts_per_token": 2, "expert_ffw_dim": 8, "first_dense_layers": 1} | changes
    )
    shape = {"vocab_size": 32, "embed_dim": 16, "ffw_dim": 24, "num_layers": 4, "num_heads": 2, "num_kv_heads": 1}
    return Model(ModelConfig(**shape, head_dim=8, max_seq_len=64, moe=moe))


MODEL = moe_model()


def record(length: int, prompt_length: int = 2, seed: int = 0, **changes) -> RolloutRecord:
    """Every value tells its token: token t is 10 seed + t, its log-probability -t, its experts differ by layer."""
    tokens_T = np.arange(length, dtype=np.int32) + 10 * seed
    logps_T = np.where(np.arange(length) < prompt_length, np.nan, -np.arange(length)).astype(np.float32)
    routes = np.random.default_rng(seed).integers(0, 8, (length, 3, 2)).astype(np.int16)
    values = {"tokens_T": tokens_T, "prompt_length": prompt_length, "logps_T": logps_T, "routes_TxLxK": routes}
    return RolloutRecord(**values | {"num_experts": 8} | changes)


def mapped(packed) -> np.ndarray:
    return (packed.routes_BxTxLxK != NOT_RECORDED).all(axis=(2, 3)) & ~np.isnan(packed.serve_logps_BxT)


def test_every_sampled_token_meets_its_own_record_in_packed_rows():
    records = [record(7, seed=0), record(4, prompt_length=1, seed=1), record(6, prompt_length=3, seed=2)]
    packed = pack_rollouts(MODEL, [each.rollout(float(at)) for at, each in enumerate(records)], 10, rows=3)
    assert packed.routes_BxTxLxK.shape == (3, 10, 3, 2)
    assert packed.batch.segments_BxT[0].max() == 2, "nothing was packed"
    seen = 0
    for row in range(3):
        for segment in range(1, packed.batch.segments_BxT[row].max() + 1):
            at = packed.batch.segments_BxT[row] == segment
            number = packed.batch.tokens_BxT[row][at][0] // 10
            own = records[number]
            np.testing.assert_array_equal(packed.batch.targets_BxT[row][at], own.tokens_T[1:])
            np.testing.assert_array_equal(packed.routes_BxTxLxK[row][at], own.routes_TxLxK[:-1])
            np.testing.assert_array_equal(packed.serve_logps_BxT[row][at], own.logps_T[1:])
            np.testing.assert_array_equal(packed.advantages_BxT[row][at], float(number))
            sampled = np.arange(1, len(own.tokens_T)) >= own.prompt_length
            np.testing.assert_array_equal(packed.batch.weights_BxT[row][at], sampled)
            np.testing.assert_array_equal(mapped(packed)[row][at], sampled)
            seen += 1
    assert seen == 3
    padding = packed.batch.segments_BxT == 0
    assert (packed.routes_BxTxLxK[padding] == NOT_RECORDED).all()
    assert not packed.batch.weights_BxT[padding].any()


def unmapped(rollout: Rollout, model: Model = MODEL) -> tuple[int, int]:
    """(sampled targets, how many of them have no record)."""
    packed = pack_rollouts(model, [rollout], 12)
    sampled = packed.batch.weights_BxT > 0
    return int(sampled.sum()), int((sampled & ~mapped(packed)).sum())


def test_a_record_counts_up_to_where_the_texts_part():
    own = record(8)
    changed = own.tokens_T.copy()
    changed[5] = 31
    # Targets 2, 3 and 4 are as sampled; 5 is another token, 6 and 7 come after it.
    assert unmapped(Rollout(changed, 2, 1.0, own)) == (6, 3)
    longer = np.concatenate([own.tokens_T, [30, 29]]).astype(np.int32)
    assert unmapped(Rollout(longer, 2, 1.0, own)) == (8, 2)
    assert unmapped(Rollout(own.tokens_T[:6], 2, 1.0, own)) == (4, 0)
    assert unmapped(Rollout(own.tokens_T + 1, 2, 1.0, own)) == (6, 6)


def test_what_was_not_recorded_or_by_another_model_maps_nothing():
    own = record(8)
    assert unmapped(own.rollout(1.0)) == (6, 0)
    assert unmapped(Rollout(own.tokens_T, 2, 1.0, None)) == (6, 6)
    for other in ({"num_experts": 16}, {"experts_per_token": 3}, {"first_dense_layers": 2}):
        assert unmapped(own.rollout(1.0), moe_model(**other)) == (6, 6), other
    routes = own.routes_TxLxK.copy()
    routes[:2] = NOT_RECORDED  # a prompt that was in a cache: its last token predicts the first that was sampled
    assert unmapped(record(8, routes_TxLxK=routes).rollout(1.0)) == (6, 1)
    routes = own.routes_TxLxK.copy()
    routes[4, 1] = NOT_RECORDED  # in one mixture of three
    assert unmapped(record(8, routes_TxLxK=routes).rollout(1.0)) == (6, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logps_T": np.zeros(3, np.float32)}, "8 tokens has log-probabilities .3,."),
        ({"routes_TxLxK": np.zeros((8, 2), np.int16)}, r"routes .8, 2.: one of each"),
        ({"routes_TxLxK": np.full((8, 3, 2), 8, np.int16)}, "experts 0 to 8 of num_experts=8: 0 to 7"),
        ({"routes_TxLxK": np.full((8, 3, 2), -2, np.int16)}, "experts -2"),
        ({"prompt_length": 9}, "prompt_length=9: 1 to 8"),
    ],
)
def test_a_record_that_does_not_hold_together_is_refused(changes, words):
    with pytest.raises(DataError, match=words):
        record(8, **changes)


@pytest.mark.parametrize(
    ("rollouts", "options", "words"),
    [
        ([record(8).rollout(1.0)], {"seq_len": 6}, "rollout 0 makes 7 predictions, a row has seq_len=6"),
        ([record(8).rollout(float("nan"))], {"seq_len": 8}, "advantage=nan"),
        ([record(8).rollout(1.0)] * 2, {"seq_len": 8, "rows": 1}, "2 rollouts fill 2 rows of 8, not rows=1"),
        ([Rollout(np.arange(3), 3, 1.0, None)], {"seq_len": 8}, "3 tokens of which 3 were given"),
    ],
)
def test_rollouts_that_cannot_be_packed_are_refused(rollouts, options, words):
    with pytest.raises(DataError, match=words):
        pack_rollouts(MODEL, rollouts, **options)
