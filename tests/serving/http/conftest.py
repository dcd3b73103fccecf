"""Servers over the engine of tests/serving: one with keys, one open to everybody on this machine."""

import pytest

from popax.data.tokenize import Tokenizer
from tests.serving.http.server import Server

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def chatty(world):
    """The byte tokenizer with a chat template."""
    import tokenizers

    return Tokenizer(tokenizers.Tokenizer.from_str(world.tokenizer.to_json()), {"chat_template": TEMPLATE})


@pytest.fixture(scope="session")
def server(world, engine, chatty):
    server = Server(engine, world.catalog, chatty)
    yield server
    server.close()


@pytest.fixture(scope="session")
def open_server(world, engine, chatty):
    server = Server(engine, world.catalog, chatty, open_to_all=True)
    yield server
    server.close()
