"""Mixed users in one batch write what each writes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popax.adapters.apply import bind, bind_slots
from popax.adapters.table import METHODS
from popax.errors import DataError
from popax.serving.generate import _generate, generate
from popax.serving.pool import stack_slots
from popax.serving.sampling import Sampling
from popax.types import NO_ADAPT

PROMPTS = [[5, 17, 3], [9], [40, 41, 42, 43, 44, 2], [1, 2], [30, 8, 8, 12, 7], [11, 11]]
SLOTS = [2, -1, 0, 2, 1, -1]
every_method = pytest.mark.parametrize("method", METHODS)
MERGING = [name for name, row in METHODS.items() if row.kind == "linear" and not row.makes_bias]


def bind_batch(users, slots):
    pool = stack_slots(users.cohort, users.adapters)
    return bind_slots(users.cohort, pool, users.shared, jnp.asarray(slots, jnp.int32))


def bind_one(users, slot):
    return NO_ADAPT if slot < 0 else bind(users.cohort, users.adapters[slot], users.shared)


def tokens(rows):
    return [row.tokens.tolist() for row in rows]


@every_method
def test_invariant_5_a_mixed_batch_is_each_user_alone(model, params, users_of, method):
    users = users_of(method)
    mixed = generate(model, params, PROMPTS, adapt=bind_batch(users, SLOTS), max_new_tokens=12)
    plain = generate(model, params, PROMPTS, max_new_tokens=12)
    for row, slot in enumerate(SLOTS):
        (alone,) = generate(model, params, [PROMPTS[row]], adapt=bind_one(users, slot), max_new_tokens=12)
        assert mixed[row].tokens.tolist() == alone.tokens.tolist(), f"row {row}, slot {slot}"
        if slot < 0:
            assert mixed[row].tokens.tolist() == plain[row].tokens.tolist()
    written = {tuple(mixed[row].tokens.tolist()) != tuple(plain[row].tokens.tolist()) for row in (0, 2, 3, 4)}
    assert True in written, "the adapters are too quiet to tell"


@pytest.mark.parametrize(
    "method", [name for name, row in METHODS.items() if row.kind == "linear" and not row.makes_bias]
)
def test_invariant_4_merged_weights_write_the_same(model, params, users_of, method):
    """What changes no weight, or gives biases to a base without any, has no merged weights: see tests/adapters."""
    users = users_of(method)
    merged = params
    for site in users.cohort.specs:
        weight, _ = users.cohort.merge(site, model.site_weight(params, site), users.adapters[1], users.shared)
        merged = model.with_site_weight(merged, site, weight)
    adapted = generate(model, params, PROMPTS, adapt=bind_batch(users, [1] * len(PROMPTS)), max_new_tokens=10)
    assert tokens(adapted) == tokens(generate(model, merged, PROMPTS, max_new_tokens=10))


@pytest.mark.parametrize("slot", [-1, 0])
def test_decoding_with_the_cache_is_the_full_forward(model, params, users_of, slot):
    users = users_of("lora")
    rows = generate(model, params, PROMPTS, adapt=bind_batch(users, [slot] * len(PROMPTS)), max_new_tokens=9)
    forward = jax.jit(lambda tokens_BxT: model(params, tokens_BxT, adapt=bind_one(users, slot)))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        text = list(prompt)
        for _ in range(9):
            padded = np.zeros((1, 16), np.int32)  # later positions are invisible to earlier ones
            padded[0, : len(text)] = text
            text.append(int(jnp.argmax(forward(padded)[0, len(text) - 1])))
        assert row.tokens.tolist() == text[len(prompt) :]


def test_invariant_7_other_users_and_other_adapters_compile_nothing(model, params, users_of):
    users, others = users_of("lora"), users_of("lora", seed=1)
    generate(model, params, PROMPTS, adapt=bind_batch(users, SLOTS), max_new_tokens=8)
    compiled = _generate._cache_size()
    generate(model, params, PROMPTS, adapt=bind_batch(users, [0, 0, 1, -1, -1, 2]), max_new_tokens=8)
    generate(model, params, PROMPTS[::-1], adapt=bind_batch(others, SLOTS), max_new_tokens=7)
    assert _generate._cache_size() == compiled


def test_a_sampled_row_depends_on_its_seed_and_not_on_its_neighbours(model, params, users_of):
    rule, users = Sampling(temperature=1.0, top_k=20, top_p=0.95), users_of("lora")
    adapt = bind_batch(users, SLOTS)
    seeds = [7, 8, 9, 7, 1, 2]
    rows = generate(model, params, PROMPTS, adapt=adapt, max_new_tokens=12, sampling=rule, seeds=seeds)
    order = [4, 2, 0, 5, 1, 3]
    moved = generate(
        model,
        params,
        [PROMPTS[i] for i in order],
        adapt=bind_batch(users, [SLOTS[i] for i in order]),
        max_new_tokens=12,
        sampling=rule,
        seeds=[seeds[i] for i in order],
    )
    assert tokens(moved) == [tokens(rows)[i] for i in order]
    (alone,) = generate(
        model, params, PROMPTS[2:3], adapt=bind_one(users, 0), max_new_tokens=12, sampling=rule, seeds=[9]
    )
    assert alone.tokens.tolist() == rows[2].tokens.tolist()
    other = generate(
        model, params, PROMPTS, adapt=adapt, max_new_tokens=12, sampling=rule, seeds=[s + 100 for s in seeds]
    )
    assert tokens(other) != tokens(rows)
    twins = generate(model, params, PROMPTS[:1] * 2, max_new_tokens=12, sampling=rule, seeds=[3, 3])
    assert twins[0].tokens.tolist() == twins[1].tokens.tolist()


def test_the_end_token_ends_its_own_row_only(model, params):
    free = generate(model, params, PROMPTS, max_new_tokens=10)
    end = int(free[0].tokens[3])
    rows = generate(model, params, PROMPTS, max_new_tokens=10, end_id=end)
    assert any(row.ended for row in rows)
    for row, whole in zip(rows, tokens(free), strict=True):
        cut = whole.index(end) if end in whole else len(whole)
        assert row.tokens.tolist() == whole[:cut]
        assert row.ended == (end in whole)


def test_as_many_tokens_as_asked_for_and_never_more(model, params):
    longest = generate(model, params, PROMPTS, max_new_tokens=11)
    for count in (1, 5, 8):
        shorter = generate(model, params, PROMPTS, max_new_tokens=count)
        assert tokens(shorter) == [row[:count] for row in tokens(longest)]
    (full,) = generate(model, params, [[1] * 4], max_new_tokens=60)  # to the last position of the context
    assert len(full.tokens) == 60


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "at least one prompt"),
        ([[1], []], {}, "at least one token"),
        ([[1] * 60], {"max_new_tokens": 5}, "max_seq_len=64"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1], [61]], {}, "prompt 1 holds token 61, the model's vocabulary has 61"),
        ([[-1]], {}, "prompt 0 holds token -1"),
        ([[1], [2]], {"seeds": [1]}, "1 seeds for 2 prompts"),
    ],
)
def test_requests_that_make_no_sense_are_named(model, params, prompts, options, words):
    with pytest.raises(DataError, match=words.replace("(", r"\(")):
        generate(model, params, prompts, **options)
