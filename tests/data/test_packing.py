"""Rows: every token is a target exactly once, within its own segment, with its bytes and its weight."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popax.data.packing import OPEN_ROWS, Document, encode_example, pack_documents, place, zero_batch
from popax.data.records import Example
from popax.data.tokenize import Encoded, load_tokenizer
from tests.shared_data import SHARED, needs_shared

BYTE = load_tokenizer("byte")
BOS, EOS = BYTE.bos_id, BYTE.eos_id


def segments_of(batch):
    """(tokens, targets, weights, bytes) of every segment of every row, positions and padding checked on the way."""
    for row in zip(*batch, strict=True):
        tokens, targets, weights, positions, segments, target_bytes = row
        used = np.flatnonzero(segments)
        assert used.tolist() == list(range(len(used)))  # padding only at the end
        assert not any(leaf[len(used) :].any() for leaf in row)
        assert sorted(set(segments[used])) == list(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            assert positions[at].tolist() == list(range(at.sum()))
            yield tokens[at], targets[at], weights[at], target_bytes[at]


@settings(deadline=None, max_examples=200)
@given(
    texts=st.lists(st.text("abé😀 ", max_size=30), max_size=12),
    seq_len=st.integers(1, 40),
    pack=st.booleans(),
)
def test_every_token_is_a_target_once(texts, seq_len, pack):
    documents = [encode_example(Example(user="u", text=text), BYTE) for text in texts]
    batch = pack_documents(documents, seq_len, pack=pack)
    assert [leaf.dtype for leaf in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32, np.int32]
    assert all(leaf.shape == (len(batch.tokens_BxT), seq_len) for leaf in batch)
    pieces = list(segments_of(batch))
    for tokens, targets, weights, _ in pieces:
        assert tokens[1:].tolist() == targets[:-1].tolist()  # the next token, never across a boundary
        assert weights.all()
    expected = sorted(t for text in texts for t in [*text.encode(), EOS])
    assert sorted(t for _, targets, _, _ in pieces for t in targets.tolist()) == expected
    assert batch.target_bytes_BxT.sum() == sum(len(text.encode()) for text in texts)
    assert batch.target_bytes_BxT[batch.targets_BxT == EOS].sum() == 0
    assert batch.weights_BxT.sum() == len(expected)
    if not pack:
        assert len(pieces) == len(batch.tokens_BxT)
    # The pieces, put together in order, are the documents.
    remaining = {tuple(targets.tolist()): None for _, targets, _, _ in pieces}
    for text in texts:
        stream = [*text.encode(), EOS]
        for start in range(0, len(stream), seq_len):
            assert tuple(stream[start : start + seq_len]) in remaining


def test_a_long_document_continues_from_its_last_target():
    batch = pack_documents([encode_example(Example(user="u", text="abcdefgh"), BYTE)], 4)
    assert batch.tokens_BxT.tolist() == [[BOS, *b"abc"], [*b"defg"], [ord("h"), 0, 0, 0]]
    assert batch.targets_BxT.tolist() == [[*b"abcd"], [*b"efgh"], [EOS, 0, 0, 0]]
    assert batch.weights_BxT.tolist() == [[1] * 4, [1] * 4, [1, 0, 0, 0]]
    assert batch.segments_BxT.tolist() == [[1] * 4, [1] * 4, [1, 0, 0, 0]]


def test_short_documents_share_a_row():
    batch = pack_documents([encode_example(Example(user="u", text=text), BYTE) for text in ("a", "b😀", "c")], 12)
    assert batch.tokens_BxT.tolist() == [[BOS, 97, BOS, *"b😀".encode(), BOS, 99, 0, 0]]
    assert batch.segments_BxT.tolist() == [[1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 0, 0]]
    assert batch.positions_BxT.tolist() == [[0, 1, 0, 1, 2, 3, 4, 5, 0, 1, 0, 0]]
    assert batch.target_bytes_BxT.tolist() == [[1, 0, 1, 4, 0, 0, 0, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("lengths", "pack", "rows"),
    [
        ([], True, []),
        ([4, 4], True, [[0], [1]]),
        ([3, 2, 1, 2], True, [[0, 2], [1, 3]]),  # each into the first row with room, to its last place
        ([1, 1, 1, 1, 1], True, [[0, 1, 2, 3], [4]]),
        ([1, 1, 1], False, [[0], [1], [2]]),
    ],
)
def test_a_piece_goes_to_the_first_row_with_room(lengths, pack, rows):
    assert place(lengths, 4, pack=pack) == rows


def test_a_row_is_closed_when_so_many_have_been_opened_after_it():
    """Each has room for one more: the first of those that are open takes it."""
    open_ = [3] * OPEN_ROWS
    assert place([*open_, 1], 4)[0] == [0, OPEN_ROWS]
    rows = place([3, *open_, 1, 1], 4)
    assert rows[:3] == [[0], [1, OPEN_ROWS + 1], [2, OPEN_ROWS + 2]]
    assert len(rows) == OPEN_ROWS + 1


def test_padding_is_zeros():
    batch = zero_batch(2, 3)
    assert {leaf.shape for leaf in batch} == {(2, 3)}
    assert not any(leaf.any() for leaf in batch)
    assert [leaf.dtype for leaf in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32, np.int32]


class Pieces:
    """What tokenizers of words do to a boundary: a mark where a text begins, "ab" is one token, and characters that
    are not known are one token however many they are."""

    START, UNKNOWN, AB, bos_id, eos_id, add_bos = 2, 3, 4, None, None, True

    def encode(self, text):
        found = re.findall("ab|[xyz]+|.", text)
        known = {"ab": self.AB, "x": self.UNKNOWN, "xy": self.UNKNOWN, "y": self.UNKNOWN}
        ids = [self.START] * bool(text) + [known.get(piece, ord(piece[0])) for piece in found]
        return Encoded(np.int32(ids), np.int32([0] * bool(text) + [len(piece.encode()) for piece in found]))


@pytest.mark.parametrize(
    ("prompt", "completion", "ids", "learnt"),
    [
        ("c", "ab", [2, ord("c"), 4], 1),  # as one text: its completion has no mark of a beginning
        ("é", "d", [2, ord("é"), ord("d")], 1),
        ("a", "b", [2, ord("a"), 2, ord("b")], 2),  # "ab" would be over the boundary
        ("x", "y", [2, 3, 2, 3], 2),  # and so would be what is unknown, though the first tokens are the same
        (None, "d", [2, ord("d")], 2),
        ("d", None, [2, ord("d")], 0),
    ],
)
def test_a_prompt_and_its_completion_are_one_text_where_no_token_is_over_the_boundary(prompt, completion, ids, learnt):
    document = encode_example(Example(user="u", prompt=prompt, completion=completion), Pieces())
    assert document.ids.tolist() == ids
    assert document.weights.tolist() == [0.0] * (len(ids) - learnt) + [1.0] * learnt
    assert document.num_bytes.sum() == len(((prompt or "") + (completion or "")).encode())


def test_a_prompt_carries_no_loss():
    document = encode_example(Example(user="u", prompt="né", completion="ja"), BYTE)
    assert document.ids.tolist() == [BOS, *"né".encode(), *b"ja", EOS]
    assert document.weights.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert document.num_bytes.tolist() == [0, 1, 2, 0, 1, 1, 0]
    assert len(pack_documents([Document(*(leaf[:4] for leaf in document))], 8).tokens_BxT) == 0  # nothing to learn


@needs_shared("tokenizers/gpt2")
def test_a_prompt_is_tokenised_as_it_stands_when_generating():
    tokenizer = load_tokenizer(SHARED / "tokenizers" / "gpt2")
    for prompt, completion in [("Hello", " world"), ("Hel", "lo world")]:  # the second would merge over the boundary
        document = encode_example(Example(user="u", prompt=prompt, completion=completion), tokenizer)
        head = tokenizer.encode(prompt).ids.tolist()
        assert document.ids[: len(head)].tolist() == head
        assert document.weights.tolist() == [0] * len(head) + [1] * (len(document.ids) - len(head))
        assert document.num_bytes.sum() == len((prompt + completion).encode())
        assert tokenizer.decode(document.ids) == prompt + completion


def test_a_conversation_is_framed_by_its_template(tmp_path):
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
    BYTE.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for template, ids, weights in [
        (
            "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
            [BOS, *b"hi", EOS, *b"ho", EOS],
            3,
        ),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", [BOS, *b"hiho", EOS], 3),
    ]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        document = encode_example(Example(user="u", messages=turns), load_tokenizer(tmp_path))
        assert document.ids.tolist() == ids
        assert document.weights.tolist() == [0] * (len(ids) - weights) + [1] * weights


def byte_tokenizer(place, **settings):
    """The byte tokenizer with other settings; None takes one away."""
    BYTE.save(place)
    path = place / "tokenizer_config.json"
    kept = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({name: value for name, value in kept.items() if value is not None}))
    return load_tokenizer(place)


def test_a_tokenizer_that_adds_no_beginning_gets_none(tmp_path):
    document = encode_example(Example(user="u", text="hi"), byte_tokenizer(tmp_path, add_bos_token=False))
    assert document.ids.tolist() == [*b"hi", EOS]
    assert document.weights.tolist() == [1, 1, 1]
    assert document.num_bytes.tolist() == [1, 1, 0]


def test_a_tokenizer_without_special_tokens_frames_nothing():
    document = encode_example(Example(user="u", text="c"), Pieces())
    assert [leaf.tolist() for leaf in document] == [[Pieces.START, ord("c")], [1, 1], [0, 1]]


def test_a_template_that_writes_the_day_writes_the_same_one_every_day(tmp_path):
    template = "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = byte_tokenizer(tmp_path, chat_template=template)
    document = encode_example(Example(user="u", messages=({"role": "assistant", "content": "ho"},)), tokenizer)
    assert document.ids.tolist() == [BOS, *b"01 Jan 2025ho", EOS]


def test_a_conversation_of_nothing_is_a_beginning_and_an_end(tmp_path):
    tokenizer = byte_tokenizer(tmp_path, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert encode_example(Example(user="u", messages=()), tokenizer).ids.tolist() == [BOS, EOS]


@needs_shared("tinystories_656k_hf", "tokenizers/minimind")
def test_framing_follows_the_tokenizer():
    example = Example(user="u", text="Once upon a time")
    stories = encode_example(example, load_tokenizer(SHARED / "tinystories_656k_hf"))
    assert stories.ids[[0, -1]].tolist() == [1, 2]
    minimind = encode_example(example, load_tokenizer(SHARED / "tokenizers" / "minimind"))  # add_bos_token: false
    assert minimind.ids[0] != 1
    assert minimind.ids[-1] == 2
