"""Named shapes that tests, tuning and benchmarks share."""

from typing import NamedTuple

TRAINING, SHORT = 64 * 512, 8192  # rows: 64 users of 512 tokens, and a quarter of that


class ArgSpec(NamedTuple):
    """One call: M rows of D against V entries of the vocabulary."""

    name: str
    rows: int
    embed: int
    vocab: int


def _model(name: str, embed: int, vocab: int) -> tuple[ArgSpec, ...]:
    return tuple(ArgSpec(f"{name}_{rows}", rows, embed, vocab) for rows in (SHORT, TRAINING))


# Heads tied to the embedding table, [V, D].
VOCAB_FIRST = (
    ArgSpec("toy_4096", 4096, 128, 512),
    *_model("qwen3_0_6b", 1024, 151936),
)
# Heads of their own, [D, V].
VOCAB_LAST = (
    ArgSpec("bench_25m_4096", 4096, 512, 4096),
    *_model("qwen3_8b", 4096, 151936),
    *_model("llama3_1_70b", 8192, 128256),
    *_model("kimi_k2", 7168, 163840),
)
