"""Documents to rows of fixed length: what is predicted from what, with which weight and how many bytes."""

import datetime
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from popax.data.records import Example
from popax.data.tokenize import Tokenizer
from popax.types import Batch

OPEN_ROWS = 16  # how many rows stay open for a later document to fit in
# Templates may write today's date into a conversation; training data must not change with the day they are read.
_TEMPLATE_DATE = datetime.datetime(2025, 1, 1)


class Document(NamedTuple):
    """One example as tokens: token t+1 is predicted from tokens up to t, for t = 0 .. T-2.

    ids int32 [T]; weights float32 [T], 0 where predicting this token carries no loss; num_bytes int32 [T].
    """

    ids: np.ndarray
    weights: np.ndarray
    num_bytes: np.ndarray


def encode_example(example: Example, tokenizer: Tokenizer) -> Document:
    """BOS, the tokens, EOS (as far as the tokenizer has them); a conversation is what its template makes of it.

    Loss is on a text's every token, on a completion and its EOS, on what the assistant says.
    """
    if example.messages is not None:
        return _encode_chat(example, tokenizer)
    if example.text is not None:
        ids, num_bytes = tokenizer.encode(example.text)
        weights = np.ones(len(ids), np.float32)
    else:
        ids, num_bytes, weights = _encode_completion(example.prompt or "", example.completion or "", tokenizer)
    return _frame(Document(ids, weights, num_bytes), tokenizer, bos=True, eos=True)


def _encode_completion(prompt: str, completion: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    head, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + completion)
    if not np.array_equal(whole.ids[: len(head.ids)], head.ids) or whole.num_bytes[: len(head.ids)].sum() != len(
        prompt.encode()
    ):
        # A token would straddle the boundary: when generating, the prompt stands there on its own.
        tail = tokenizer.encode(completion)
        whole = type(head)(*(np.concatenate(pair) for pair in zip(head, tail, strict=True)))
    weights = np.ones(len(whole.ids), np.float32)
    weights[: len(head.ids)] = 0.0
    return whole.ids, whole.num_bytes, weights


def _encode_chat(example: Example, tokenizer: Tokenizer) -> Document:
    assert example.messages is not None
    chat = tokenizer.chat(example.messages, now=_TEMPLATE_DATE)
    document = Document(chat.ids, chat.weights, chat.num_bytes)
    # Most templates write BOS and an end of turn themselves.
    has_bos = len(chat.ids) > 0 and chat.ids[0] == tokenizer.bos_id
    return _frame(document, tokenizer, bos=not has_bos, eos=tokenizer.eos_id not in chat.ids)


def _frame(document: Document, tokenizer: Tokenizer, *, bos: bool, eos: bool) -> Document:
    ends = [[tokenizer.bos_id] if bos and tokenizer.add_bos else [], [tokenizer.eos_id] if eos else []]
    before, after = ([i for i in end if i is not None] for end in ends)

    def around(middle: np.ndarray, first: Sequence[float], last: Sequence[float]) -> np.ndarray:
        return np.concatenate([np.asarray(first, middle.dtype), middle, np.asarray(last, middle.dtype)])

    return Document(
        around(document.ids, before, after),
        around(document.weights, [0.0] * len(before), [1.0] * len(after)),
        around(document.num_bytes, [0] * len(before), [0] * len(after)),
    )


def pack_documents(documents: Iterable[Document], seq_len: int, *, pack: bool = True) -> Batch:
    """Rows [M, seq_len] in which every token of every document but its first is a target once.

    A document of more than seq_len predictions is cut into pieces; the first input of a piece is the last target of
    the piece before. pack: several pieces share a row, as segments 1, 2, ... whose positions restart at 0; otherwise
    a row each. Pieces without any loss are left out. Padding is segment 0 with weight 0.
    """
    pieces = list(_pieces(documents, seq_len))
    rows = place([len(piece.ids) - 1 for piece in pieces], seq_len, pack=pack)
    batch = zero_batch(len(rows), seq_len)
    for row, members in enumerate(rows):
        fill_row(batch, row, [pieces[member] for member in members])
    return batch


def place(lengths: Sequence[int], seq_len: int, *, pack: bool = True) -> list[list[int]]:
    """Which pieces lie in which row, one after the other: the first open row with room, else a new one."""
    rows: list[list[int]] = []
    room: list[int] = []
    for piece, length in enumerate(lengths):
        fits = (row for row in range(max(0, len(rows) - OPEN_ROWS), len(rows)) if pack and room[row] >= length)
        row = next(fits, None)
        if row is None:
            rows.append([])
            room.append(seq_len)
            row = len(rows) - 1
        rows[row].append(piece)
        room[row] -= length
    return rows


def _pieces(documents: Iterable[Document], seq_len: int) -> Iterable[Document]:
    for document in documents:
        for start in range(0, len(document.ids) - 1, seq_len):
            piece = Document(*(leaf[start : start + seq_len + 1] for leaf in document))
            if piece.weights[1:].any():
                yield piece


def fill_row(batch: Batch, row: int, pieces: Sequence[Document]) -> None:
    """Write the pieces into a row of a zero_batch as segments 1, 2, ..., each where the one before ends."""
    start = 0
    for segment, piece in enumerate(pieces, 1):
        length = len(piece.ids) - 1
        values = Batch._make(
            [
                piece.ids[:-1],
                piece.ids[1:],
                piece.weights[1:],
                np.arange(length),
                np.full(length, segment),
                piece.num_bytes[1:],
            ]
        )
        for leaf, value in zip(batch, values, strict=True):
            np.asarray(leaf)[row, start : start + length] = value
        start += length


def zero_batch(*shape: int) -> Batch:
    """Padding only: int32 zeros, and float32 zeros for the weights."""
    return Batch._make(
        np.zeros(shape, np.float32 if name.startswith("weights") else np.int32) for name in Batch._fields
    )
