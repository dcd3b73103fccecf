"""The real `openai` package against a server: what everyone's programs do."""

import threading
import time

import pytest

from tests.serving.http.server import KEYS

openai = pytest.importorskip("openai", reason="needs the parity extra")
pytestmark = pytest.mark.parity
PROMPT = "how do i mount a disk"


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS["acme"], max_retries=0, timeout=60) as client:
        yield client


def alone(world, text, count, user):
    return world.tokenizer.decode(world.alone(world.tokenizer.encode(text).ids.tolist(), count, user))


def test_completions(client, world):
    made = client.completions.create(model="user-1", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=2)
    assert made.choices[0].text == alone(world, PROMPT, 8, "acme/user-1")
    assert len(made.choices[0].logprobs.token_logprobs) == 8
    assert made.usage.completion_tokens == 8
    text = made.choices[0].text
    stopped = client.completions.create(model="user-1", prompt=PROMPT, max_tokens=8, temperature=0, stop=text[3:5])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (text[: text.index(text[3:5])], "stop")


def test_chat_and_streams(client, world):
    messages = [{"role": "user", "content": "hi"}]
    options = {"model": "user-3@promoted", "messages": messages, "temperature": 0, "max_completion_tokens": 6}
    made = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert made.choices[0].message.content == alone(world, "user: hi\nassistant: ", 6, "acme/user-3")
    assert len(made.choices[0].logprobs.content) == 6
    assert len(made.choices[0].logprobs.content[0].top_logprobs) == 2
    parts = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == made.choices[0].message.content
    assert parts[-1].usage.total_tokens == made.usage.total_tokens


def test_seeds_and_choices(client):
    options = {"model": "base", "prompt": PROMPT, "max_tokens": 8, "temperature": 1.0, "n": 3}
    first, again, other = (client.completions.create(**options, seed=seed) for seed in (1, 1, 9))
    texts = [[choice.text for choice in made.choices] for made in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 3


def test_models(client):
    names = [model.id for model in client.models.list()]
    assert {"base", "user-1", "user-63"} <= set(names)
    assert client.models.retrieve("user-1").owned_by == "acme"


def test_errors_have_their_classes(client, server):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="user-2", prompt="a")
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="user-1", prompt="a" * 500)
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="nobody's", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_a_full_queue_is_a_rate_limit(client, engine):
    gate = threading.Event()
    engine.call(gate.wait)
    held = []
    limit = engine.waiting_per_tenant

    def ask():
        held.append(client.completions.create(model="base", prompt=[[1]] * limit_of_a_body, max_tokens=1))

    limit_of_a_body = 64
    threads = [threading.Thread(target=ask) for _ in range(limit // limit_of_a_body)]
    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30
        while engine.state().waiting < limit and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as error:
            client.completions.create(model="base", prompt="a", max_tokens=1)
        assert error.value.response.headers["retry-after"] == "1"
    finally:
        gate.set()
    for thread in threads:
        thread.join()
    assert sum(len(made.choices) for made in held) == limit


def test_a_cancelled_stream_frees_its_slot_and_pages(client, engine, world):
    stream = client.completions.create(model="user-1", prompt=PROMPT, max_tokens=100, stream=True)
    next(iter(stream))
    stream.close()
    assert engine.wait_idle(30)
    assert engine.state().pages_held == 0
    for residency in engine.rooms.residencies.values():
        assert not any(one and one["held"] for one in residency.occupants())
