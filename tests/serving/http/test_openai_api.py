"""Completions, chat and models over a socket, each held against `generate` or a closed form."""

import json

import numpy as np
import pytest

from tests.serving.http.server import events

PROMPT = "how do i mount a disk"
GREEDY = {"temperature": 0.0, "max_tokens": 12}


def tokens(world, text):
    return world.tokenizer.encode(text).ids.tolist()


def test_a_completion_is_the_users_own(world, server):
    with server.client("acme") as client:
        for name, user in (("user-1", "acme/user-1"), ("user-3", "acme/user-3"), ("base", None)):
            found = client.post("/v1/completions", json={"model": name, "prompt": PROMPT, **GREEDY})
            assert found.status_code == 200, found.text
            made = found.json()
            alone = world.alone(tokens(world, PROMPT), 12, user)
            assert made["choices"][0]["text"] == world.tokenizer.decode(alone)
            assert made["choices"][0]["finish_reason"] == "length"
            assert made["usage"] == {
                "prompt_tokens": len(PROMPT),
                "completion_tokens": 12,
                "total_tokens": len(PROMPT) + 12,
            }


def test_a_stream_is_the_whole_in_parts(world, server):
    with server.client("acme") as client:
        body = {"model": "user-1", "prompt": [PROMPT, "b"], "n": 2, "seed": 3, "max_tokens": 9, "temperature": 0.9}
        whole = client.post("/v1/completions", json=body).json()["choices"]
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            parts = events(response)
        assert parts[-1]["choices"] == []
        assert parts[-1]["usage"]["completion_tokens"] == 4 * 9
        texts, ends = [""] * 4, [None] * 4
        for part in parts[:-1]:
            [choice] = part["choices"]
            texts[choice["index"]] += choice["text"]
            ends[choice["index"]] = choice["finish_reason"] or ends[choice["index"]]
        assert texts == [choice["text"] for choice in whole]
        assert ends == ["length"] * 4
        assert len(set(texts[:2])) == 2  # n answers, n seeds


def test_echo_and_logprobs_are_the_models_own(world, server):
    body = {"model": "user-1", "prompt": PROMPT, **GREEDY, "max_tokens": 4, "echo": True, "logprobs": 2}
    with server.client("acme") as client:
        [choice] = client.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"].startswith(PROMPT)
    found = choice["logprobs"]
    ids = tokens(world, PROMPT) + world.alone(tokens(world, PROMPT), 4, "acme/user-1")
    logps = world.logps(ids, "acme/user-1")
    assert found["token_logprobs"][0] is None
    wanted = [logps[at, token] for at, token in enumerate(ids[1:])]
    np.testing.assert_allclose(found["token_logprobs"][1:], wanted, atol=2e-5)
    assert "".join(found["tokens"][: len(PROMPT)]) == PROMPT
    assert found["text_offset"][:3] == [0, 1, 2]


def test_chat_goes_through_the_template(world, server):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    body = {"model": "user-3", "messages": messages, "temperature": 0.0, "max_completion_tokens": 6}
    body |= {"logprobs": True, "top_logprobs": 2}
    rendered = "system: be brief\nuser: hi\nassistant: "
    alone = world.alone(tokens(world, rendered), 6, "acme/user-3")
    with server.client("acme") as client:
        made = client.post("/v1/chat/completions", json=body).json()
        [choice] = made["choices"]
        assert choice["message"] == {"role": "assistant", "content": world.tokenizer.decode(alone), "refusal": None}
        assert made["usage"]["prompt_tokens"] == len(rendered)
        content = choice["logprobs"]["content"]
        assert len(content) == 6
        assert content[0]["logprob"] == content[0]["top_logprobs"][0]["logprob"]
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            parts = events(response)
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == choice["message"]["content"]


def test_json_of_a_schema(server):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "t", "schema": schema}}
    body = {"model": "user-1", "messages": [{"role": "user", "content": "hi"}], "response_format": wanted, "seed": 1}
    with server.client("acme") as client:
        for seed in range(3):
            [choice] = client.post("/v1/chat/completions", json=body | {"seed": seed}).json()["choices"]
            made = json.loads(choice["message"]["content"])
            assert type(made["a"]) is bool
            assert made["b"] in ("x", "y")
            assert choice["finish_reason"] == "stop"
        broken = {"type": "json_schema", "json_schema": {"name": "t", "schema": {"type": "nonsense"}}}
        assert client.post("/v1/chat/completions", json=body | {"response_format": broken}).status_code == 400


def test_a_sum_by_name(world, server):
    with server.client("acme") as client:
        texts = [
            client.post("/v1/completions", json={"model": name, "prompt": PROMPT, **GREEDY}).json()["choices"][0][
                "text"
            ]
            for name in ("user-1", "user-1+0*user-3", "user-1+0.5*user-3", "0.5*user-3 + user-1", "user-1+base")
        ]
        assert texts[0] == texts[1] == texts[4] != texts[2] == texts[3]
        assert client.get("/v1/models/user-1+0.5*user-3").json()["sum"][1]["weight"] == 0.5
        for wrong in ("user-1+", "nan*user-1", "user-1+user-7+user-13", "x*user-1"):
            found = client.post("/v1/completions", json={"model": wrong, "prompt": "a"})
            assert found.status_code in (400, 404), (wrong, found.text)


def test_models_are_paged_and_only_ones_own(world, server):
    with server.client("acme") as client:
        seen, after = [], None
        while True:
            found = client.get("/v1/models", params={"limit": 7} | ({"after": after} if after else {})).json()
            assert len(found["data"]) <= 7
            seen += [one["id"] for one in found["data"]]
            after = found["last_id"]
            if not found["has_more"]:
                break
        mine = sorted(user.removeprefix("acme/") for user in world.users if user.startswith("acme/"))
        assert sorted(name for name in seen if name.startswith("user-")) == mine
        assert seen.count("base") == 1
        assert not any("zeta" in name for name in seen)
        assert client.get("/v1/models/user-1").json()["method"] == "lora"
        filtered = client.get("/v1/models", params={"prefix": "user-1"}).json()["data"]
        assert {one["id"] for one in filtered} == {name for name in mine if name.startswith("user-1")}


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "nobody"}, 404),
        ({"model": "user-1@99"}, 404),
        ({"temperature": 3.0}, 400),
        ({"temperature": "hot"}, 400),
        ({"n": 0}, 400),
        ({"prompt": ""}, 400),
        ({"prompt": []}, 400),
        ({"prompt": [999999]}, 400),
        ({"prompt": "x" * 200}, 400),
        ({"logit_bias": {"x": 1}}, 400),
        ({"logit_bias": {"9999": 1}}, 400),
        ({"best_of": 3}, 400),
        ({"tools": []}, 400),
        ({"stop": ["a"] * 17}, 400),
    ],
)
def test_what_is_wrong_is_said_as_openai_says_it(server, change, status):
    with server.client("acme") as client:
        found = client.post("/v1/completions", json={"model": "user-1", "prompt": "a", "max_tokens": 2} | change)
        assert found.status_code == status, found.text
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}
