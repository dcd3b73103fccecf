"""Text to token ids and back, with the number of UTF-8 bytes that every token stands for."""

import datetime
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from popax.data.chat import ChatTemplate
from popax.errors import TokenizerError

BYTE = "byte"
SPECIAL_NAMES = {
    # Only consulted where a tokenizer.json comes without its tokenizer_config.json.
    "bos_token": ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos_token": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"),
    "pad_token": ("<pad>", "[PAD]"),
}


class Encoded(NamedTuple):
    """ids int32 [T]; num_bytes int32 [T], the UTF-8 bytes of the text that each token stands for."""

    ids: np.ndarray
    num_bytes: np.ndarray


class EncodedChat(NamedTuple):
    """A conversation: ids int32 [T], num_bytes int32 [T] (0 for special tokens), weights float32 [T].

    weights are 1 on what the assistant wrote, its end-of-turn token included, and 0 elsewhere.
    """

    ids: np.ndarray
    num_bytes: np.ndarray
    weights: np.ndarray


@final
class Tokenizer:
    """A tokenizer of the `tokenizers` library, with what its tokenizer_config.json adds (special tokens, template)."""

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]):
        # Two copies: `encode_special_tokens` is a switch on a shared object, and several threads encode at once.
        self._plain, self._special = (tokenizers.Tokenizer.from_str(backend.to_str()) for _ in range(2))
        for copy in (self._plain, self._special):
            copy.no_padding()
            copy.no_truncation()
        self._plain.encode_special_tokens = True
        self._config = dict(config)
        self._special_ids = np.asarray(
            sorted(i for i, token in self._special.get_added_tokens_decoder().items() if token.special), np.int32
        )
        self.vocab_size: int = max(self._special.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        self.pad_id = self._id_of("pad_token")

    @property
    def add_bos(self) -> bool:
        """Does a document begin with BOS? No where the tokenizer has none, or its config says add_bos_token false."""
        return self.bos_id is not None and self._config.get("add_bos_token") is not False

    def encode(self, text: str, *, special_tokens: bool = False) -> Encoded:
        """Token ids without BOS and EOS; num_bytes sums to len(text.encode()).

        A character split over several tokens counts at its first. special_tokens: read "<|eos|>" and the like in the
        text as the special token; otherwise, since text comes from users, as ordinary characters.
        """
        return self._encode(text, special_tokens=special_tokens)[0]

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self._special.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        *,
        now: datetime.datetime | None = None,
    ) -> EncodedChat:
        """The conversation in the tokenizer's own template, with loss on assistant turns only.

        now: the date that a template may write into its system turn; by default the clock's.
        Raises TokenizerError where the tokenizer has no chat template, or the template refuses the messages.
        """
        rendered = self._template.render(messages, add_generation_prompt=add_generation_prompt, now=now)
        encoded, starts = self._encode(rendered.text, special_tokens=True)
        inside = np.zeros(len(rendered.text) + 1, np.float32)
        for start, end in rendered.assistant_spans:
            inside[start:end] = 1.0
        num_bytes = np.where(np.isin(encoded.ids, self._special_ids), 0, encoded.num_bytes).astype(np.int32)
        return EncodedChat(encoded.ids, num_bytes, inside[starts])

    @functools.cached_property
    def digest(self) -> str:
        """Of all that decides which tokens a text becomes: the vocabulary, special tokens, the template."""
        whole = json.dumps([json.loads(self.to_json()), self._config], sort_keys=True, default=str)
        return hashlib.sha256(whole.encode()).hexdigest()

    def to_json(self) -> str:
        """What `save` writes as tokenizer.json."""
        return self._special.to_str()

    def save(self, directory: str | Path) -> None:
        """tokenizer.json and tokenizer_config.json; `load_tokenizer(directory)` reads them back."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._special.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps(self._config, indent=2, ensure_ascii=False))

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        source = self._config.get("chat_template")
        if isinstance(source, list):  # several named templates
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not source:
            raise TokenizerError(
                "this tokenizer has no chat_template: use a tokenizer whose tokenizer_config.json has one, "
                "or give text or prompt+completion instead of messages"
            )
        variables = {name: token for name in SPECIAL_NAMES if (token := _content(self._config.get(name)))}
        added = self._special.get_added_tokens_decoder().values()
        return ChatTemplate(source, variables, tuple(token.content for token in added if token.special))

    def _encode(self, text: str, *, special_tokens: bool) -> tuple[Encoded, np.ndarray]:
        """Also returns the index of the first character of each token."""
        backend = self._special if special_tokens else self._plain
        encoding = backend.encode(text, add_special_tokens=False)
        ids = np.asarray(encoding.ids, np.int32)
        if not len(ids):
            if text:
                raise TokenizerError(f"the tokenizer makes no token of {text[:40]!r}, whose bytes cannot be counted")
            return Encoded(ids, np.zeros(0, np.int32)), np.zeros(0, np.int64)
        spans = np.asarray(encoding.offsets, np.int64)
        # Each token takes the characters up to its end that no earlier token took: what the tokenizer skipped goes to
        # the next token, what it dropped at the end to the last, and a split character to the first of its tokens.
        ends = np.maximum.accumulate(spans[:, 1])
        ends[-1] = len(text)
        bytes_before = np.concatenate([[0], np.cumsum(_utf8_lengths(text))])
        num_bytes = np.diff(bytes_before[ends], prepend=0)
        return Encoded(ids, num_bytes.astype(np.int32)), spans[:, 0]

    def _id_of(self, name: str) -> int | None:
        token = _content(self._config.get(name))
        if token is None:
            return None
        token_id = self._special.token_to_id(token)
        if token_id is None:
            raise TokenizerError(
                f"{name} {token!r} of tokenizer_config.json is not in the vocabulary of tokenizer.json"
            )
        return token_id


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """ "byte" is the built-in byte tokenizer; otherwise a directory with tokenizer.json, or that file itself.

    Special tokens come from tokenizer_config.json, then special_tokens_map.json, then the usual names among the
    vocabulary's special tokens. Raises TokenizerError.
    """
    if str(path_or_name) == BYTE:
        return _byte_tokenizer()
    path = Path(path_or_name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise TokenizerError(f"no tokenizer at {file}: give a directory with tokenizer.json, that file, or {BYTE!r}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{file} is not a tokenizer of the `tokenizers` library: {error}") from error
    return Tokenizer(backend, _read_config(file.parent, backend))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with <bos>, <eos>, <pad>; the same texts give the same tokenizer.

    Raises TokenizerError where vocab_size has no room for 256 bytes and 3 special tokens.
    """
    special = ["<bos>", "<eos>", "<pad>"]
    if vocab_size < 256 + len(special):
        raise TokenizerError(
            f"vocab_size={vocab_size}: at least {256 + len(special)} (256 bytes, {len(special)} special)"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"})


def _byte_tokenizer() -> Tokenizer:
    """Id = byte; then <bos> 256, <eos> 257, <pad> 258."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={_byte_symbol(b): b for b in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    return Tokenizer(backend, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"})


def _byte_symbol(byte: int) -> str:
    """The printable character by which byte-level BPE writes a byte: itself, or the next free one from U+0100."""

    def printable(b: int) -> bool:
        return 0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or 0xAE <= b <= 0xFF

    return chr(byte) if printable(byte) else chr(0x100 + sum(not printable(b) for b in range(byte)))


def _read_config(directory: Path, backend: tokenizers.Tokenizer) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            try:
                config |= json.loads((directory / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise TokenizerError(f"{directory / name} is not JSON: {error}") from error
    if (directory / "chat_template.jinja").is_file():
        config["chat_template"] = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    if not any(name in config for name in SPECIAL_NAMES):
        config |= _guess_specials(backend)
    return config


def _guess_specials(backend: tokenizers.Tokenizer) -> dict[str, str]:
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    found = {}
    for name, candidates in SPECIAL_NAMES.items():
        matches = [candidate for candidate in candidates if candidate in special]
        if matches:
            found[name] = matches[0]
    if "pad_token" not in found and backend.padding:
        found["pad_token"] = backend.padding["pad_token"]
    return found


def _content(token: Any) -> str | None:
    """A special token in a config is its text, or a dictionary with the text as "content"."""
    return token.get("content") if isinstance(token, Mapping) else token


def _utf8_lengths(text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
