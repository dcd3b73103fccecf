"""Chat templates: rendered as transformers renders them, with loss on assistant turns only."""

import datetime
import json

import numpy as np
import pytest

from popax.data.tokenize import load_tokenizer
from popax.errors import TokenizerError
from tests.shared_data import SHARED, needs_shared

PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}U:{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
)
# As Qwen3 does: only the last turn keeps its (empty) reasoning, earlier ones are written without.
REWRITING = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}{{ eos_token }}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello, hallå"},
    {"role": "assistant", "content": "Tjena 😀"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Bye"},
]


def byte_tokenizer(tmp_path, template):
    load_tokenizer("byte").save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return load_tokenizer(tmp_path)


def spoken(tokenizer, chat):
    """The text that carries loss, one string for each run of tokens."""
    edges = np.flatnonzero(np.diff(chat.weights, prepend=0, append=0))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [tokenizer.decode(chat.ids[a:b], skip_special_tokens=False) for a, b in runs]


@pytest.mark.parametrize("template", [PLAIN, MARKED, REWRITING], ids=["plain", "marked", "rewriting"])
def test_only_what_the_assistant_says_carries_loss(tmp_path, template):
    tokenizer = byte_tokenizer(tmp_path, template)
    chat = tokenizer.chat(TURNS)
    last = "<think></think>Bye<eos>" if template == REWRITING else "Bye<eos>"
    assert spoken(tokenizer, chat) == ["Tjena 😀<eos>", last]
    assert chat.weights.dtype == np.float32
    text = tokenizer.decode(chat.ids, skip_special_tokens=False)
    written = text.replace("<bos>", "").replace("<eos>", "")
    assert chat.num_bytes.sum() == len(written.encode())  # special tokens stand for no bytes


def test_generation_prompt_continues_into_the_turn(tmp_path):
    tokenizer = byte_tokenizer(tmp_path, PLAIN)
    prompt, whole = tokenizer.chat(TURNS[:4], add_generation_prompt=True), tokenizer.chat(TURNS)
    assert whole.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist()
    assert whole.weights[len(prompt.ids) :].all()


@needs_shared("tokenizers/minimind")
def test_minimind_turns_end_with_their_end_token():
    tokenizer = load_tokenizer(SHARED / "tokenizers" / "minimind")
    chat = tokenizer.chat(TURNS)
    assert spoken(tokenizer, chat) == ["Tjena 😀<|im_end|>", "Bye<|im_end|>"]
    thoughtful = [*TURNS[:2], {"role": "assistant", "content": "Oh", "reasoning_content": "Hm."}]
    assert spoken(tokenizer, tokenizer.chat(thoughtful)) == ["Hm.\n</think>\n\nOh<|im_end|>"]


@pytest.mark.parity
@needs_shared("tokenizers/minimind")
def test_same_ids_as_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(SHARED / "tokenizers" / "minimind"))
    ours = load_tokenizer(SHARED / "tokenizers" / "minimind")
    for prompt in (False, True):
        expected = theirs.apply_chat_template(TURNS[:4], add_generation_prompt=prompt, tokenize=True, return_dict=False)
        assert ours.chat(TURNS[:4], add_generation_prompt=prompt).ids.tolist() == list(expected)


def test_templates_get_the_usual_functions(tmp_path):
    tokenizer = byte_tokenizer(
        tmp_path,
        "{{ strftime_now('%Y') }} {{ messages[0] | tojson }}{% for m in messages %}"
        "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{% endfor %}",
    )
    chat = tokenizer.chat(TURNS[1:2], now=datetime.datetime(1999, 1, 1))
    assert tokenizer.decode(chat.ids) == '1999 {"role": "user", "content": "Hello, hallå"}'
    with pytest.raises(TokenizerError, match="no tools here"):
        tokenizer.chat([{"role": "tool", "content": "x"}])


def test_bad_templates_are_named(tmp_path):
    with pytest.raises(TokenizerError, match="no chat_template"):
        load_tokenizer("byte").chat(TURNS)
    with pytest.raises(TokenizerError, match="does not parse"):
        byte_tokenizer(tmp_path, "{% for %}").chat(TURNS)
    with pytest.raises(TokenizerError, match="refuses messages"):
        byte_tokenizer(tmp_path, "{{ ''.__class__.__mro__ }}").chat(TURNS)  # sandboxed
    with pytest.raises(TokenizerError, match="cannot tell which part"):
        byte_tokenizer(tmp_path, "{{ messages | length }}{{ messages[1].content }}").chat(TURNS)
