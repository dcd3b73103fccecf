"""Tokenizers: exact byte accounting, round trips, special tokens, determinism."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.data.tokenize import load_tokenizer, train_bpe
from popax.errors import TokenizerError
from tests.shared_data import SHARED, needs_shared

BYTE = load_tokenizer("byte")
BPE = train_bpe(["the cat sat on the mat, ça va? 猫が座った 😀😀 " * 20], 400)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
@settings(deadline=None, max_examples=150)
@given(text=texts | texts.map(lambda t: t + "<eos>" + t))
def test_bytes_sum_exactly_and_text_comes_back(tokenizer, text):
    ids, num_bytes = tokenizer.encode(text)
    assert ids.dtype == num_bytes.dtype == np.int32
    assert ids.shape == num_bytes.shape
    assert num_bytes.sum() == len(text.encode())
    assert (num_bytes >= 0).all()
    assert tokenizer.decode(ids) == text
    assert not np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]).any()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs_shared(name))
        for name in ("tokenizers/gpt2", "tokenizers/minimind", "tinystories_656k_hf")
    ],
)
def test_bytes_sum_exactly_in_real_tokenizers(name):
    tokenizer = load_tokenizer(SHARED / name)

    @settings(deadline=None, max_examples=100)
    @given(text=texts | st.sampled_from(["héé 😀<|endoftext|> x  ", " lead", "a  b", "tail ", "\n\n", "x" * 2000]))
    def check(text):
        ids, num_bytes = tokenizer.encode(text)
        assert num_bytes.sum() == len(text.encode())
        assert len(ids) == len(num_bytes)  # in particular: gpt2's own padding and truncation to 256 are off
        if name.startswith("tokenizers/"):
            assert tokenizer.decode(ids) == text

    check()


def test_a_split_character_counts_once_at_its_first_token():
    ids, num_bytes = BYTE.encode("a😀é")
    assert ids.tolist() == list("a😀é".encode())
    assert num_bytes.tolist() == [1, 4, 0, 0, 0, 2, 0]


@needs_shared("tokenizers/gpt2")
def test_gpt2_ids_are_the_published_ones():
    tokenizer = load_tokenizer(SHARED / "tokenizers" / "gpt2")
    assert tokenizer.encode("Hello world, hello").ids.tolist() == [15496, 995, 11, 23748]
    assert tokenizer.encode("Hello world, hello").num_bytes.tolist() == [5, 6, 1, 6]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)
    assert len(tokenizer.encode("word " * 1000).ids) > 900


@needs_shared("tinystories_656k_hf", "tokenizers/minimind")
def test_special_tokens_come_from_the_config():
    minimind = load_tokenizer(SHARED / "tokenizers" / "minimind")
    assert (minimind.bos_id, minimind.eos_id, minimind.pad_id, minimind.add_bos) == (1, 2, 0, False)
    stories = load_tokenizer(SHARED / "tinystories_656k_hf")
    assert (stories.bos_id, stories.eos_id, stories.pad_id, stories.add_bos) == (1, 2, 0, True)
    assert (BYTE.vocab_size, BYTE.bos_id, BYTE.eos_id, BYTE.pad_id) == (259, 256, 257, 258)


def test_special_tokens_in_text_are_plain_unless_asked():
    assert 257 not in BYTE.encode("a<eos>").ids
    ids, num_bytes = BYTE.encode("a<eos>", special_tokens=True)
    assert ids.tolist() == [97, 257]
    assert num_bytes.tolist() == [1, 5]
    assert BYTE.decode(ids) == "a"
    assert BYTE.decode(ids, skip_special_tokens=False) == "a<eos>"


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    for again in (load_tokenizer(tmp_path / "t"), load_tokenizer(str(tmp_path / "t" / "tokenizer.json"))):
        assert again.encode("the cat ça 😀").ids.tolist() == tokenizer.encode("the cat ça 😀").ids.tolist()
        assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


def test_bpe_is_deterministic_whatever_the_threads(tmp_path):
    program = (
        "import sys; from popax.data.tokenize import train_bpe;"
        "train_bpe([f'def f{i % 97}(x): return x * {i}; # über {i * i}' for i in range(3000)], 700).save(sys.argv[1])"
    )
    for threads in ("1", "4"):
        environment = {"PATH": "", "RAYON_NUM_THREADS": threads, "PYTHONPATH": ":".join(p for p in sys.path if p)}
        subprocess.run([sys.executable, "-c", program, str(tmp_path / threads)], check=True, env=environment)
    one, four = ((tmp_path / threads / "tokenizer.json").read_bytes() for threads in ("1", "4"))
    assert one == four
    assert load_tokenizer(tmp_path / "1").vocab_size == 700


def test_bad_tokenizers_are_named(tmp_path):
    with pytest.raises(TokenizerError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
    BYTE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<start>"}))
    with pytest.raises(TokenizerError, match=r"'<start>' .* is not in the vocabulary"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="vocab_size=100"):
        train_bpe(["x"], 100)
