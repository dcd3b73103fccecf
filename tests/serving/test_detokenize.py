"""Text as it comes: never half a character, never part of a stop text, and in sum what a whole decoding gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popax.data.tokenize import load_tokenizer
from popax.serving.detokenize import TextStream

BYTES = load_tokenizer("byte")


def pushed(text, stops=()):
    stream = TextStream.of(BYTES, stops)
    parts = []
    for token in BYTES.encode(text).ids.tolist():
        parts.append(stream.push(token))
        if stream.stopped is not None:
            return stream, parts
    return stream, [*parts, stream.finish()]


@given(st.text(max_size=40))
def test_the_parts_are_the_text(text):
    _, parts = pushed(text)
    assert "".join(parts) == BYTES.decode(BYTES.encode(text).ids)


def test_a_character_comes_whole():
    _, parts = pushed("a€b")
    assert parts == ["a", "", "", "€", "b", ""]


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_it_ends_before_the_first_stop(text, stops):
    stream, parts = pushed(text, stops)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not ends:
        assert ("".join(parts), stream.stopped) == (text, None)
    else:
        # The stop that is complete first ends it; nothing of what comes after is said.
        assert stream.stopped in stops
        first = min(end for end, _ in ends)
        assert "".join(parts) == text[: min(at for end, at in ends if end == first)]


def test_what_may_become_a_stop_is_held_back():
    stream = TextStream.of(BYTES, ["END"])
    assert [stream.push(ord(letter)) for letter in "xENy"] == ["x", "", "", "ENy"]
    assert [stream.push(ord(letter)) for letter in "EN"] == ["", ""]
    assert stream.finish() == "EN"


@pytest.mark.parametrize("broken", [[0xE2], [0xE2, 0x82], [0xFF] * 20])
def test_broken_bytes_are_told_in_the_end(broken):
    stream = TextStream.of(BYTES)
    text = "".join(stream.push(token) for token in broken) + stream.finish()
    assert text == BYTES.decode(broken)
