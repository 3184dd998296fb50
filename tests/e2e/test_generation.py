"""Chat and completions over HTTP, streamed and whole: the two must say the same."""

from __future__ import annotations

import pytest

from tests.e2e.process import ServerProcess
from tests.e2e.sse import finish_of, stream, text_of
from tests.models import VOCAB_SIZE

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
ENDPOINTS = pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, {"messages": HELLO, "max_tokens": 12}), (COMPLETIONS, {"prompt": "Hello", "max_tokens": 12})],
    ids=["chat", "completions"],
)


@pytest.fixture(autouse=True)
def _leaves_the_server_idle(server: ServerProcess):
    yield
    server.until_idle(64)


def post(server: ServerProcess, path: str, body: dict, **headers: str):
    response = server.client.post(path, json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def whole_text(choice: dict) -> str:
    return choice["message"]["content"] if "message" in choice else choice["text"]


@ENDPOINTS
def test_a_stream_says_what_a_whole_answer_says(server, path, body):
    whole = post(server, path, body)
    chunks = stream(server.client, path, body)
    assert text_of(chunks) == whole_text(whole["choices"][0]) != ""
    assert finish_of(chunks) == [whole["choices"][0]["finish_reason"]] == ["length"]
    assert whole["usage"]["completion_tokens"] == 12
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["model"] == whole["model"] == "sim"


def test_a_chat_that_names_a_service_tier_is_told_the_one_there_is(server):
    body = {"messages": HELLO, "max_tokens": 2, "service_tier": "flex"}
    chunks = stream(server.client, CHAT, body | {"stream_options": {"include_usage": True}})
    assert {each.get("service_tier") for each in [post(server, CHAT, body), *chunks]} == {"default"}
    assert "service_tier" not in post(server, CHAT, body | {"service_tier": None})


@pytest.mark.parametrize("fields", [{"stop": [" w5", "9 w"]}, {"stop": "w", "include_stop_str_in_output": True}])
@ENDPOINTS
def test_stop_strings(server, path, body, fields):
    body = body | {"max_tokens": 200} | fields
    whole = post(server, path, body)
    choice = whole["choices"][0]
    chunks = stream(server.client, path, body | {"stream_options": {"include_usage": True}})
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] in fields["stop"]
    assert (choice["stop_reason"] in whole_text(choice)) is ("include_stop_str_in_output" in fields)
    assert text_of(chunks) == whole_text(choice)
    assert finish_of(chunks) == ["stop"]
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] < 200


def test_stop_token_ids(server):
    free = post(server, COMPLETIONS, {"prompt": [5, 6, 7], "max_tokens": 8, "logprobs": 0})
    text = free["choices"][0]["logprobs"]["tokens"][4]
    stop_id = int(text.strip().removeprefix("w"))
    answer = post(server, COMPLETIONS, {"prompt": [5, 6, 7], "max_tokens": 8, "stop_token_ids": [stop_id]})
    choice = answer["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop_id)
    assert choice["text"] == "".join(free["choices"][0]["logprobs"]["tokens"][:4])
    assert answer["usage"]["completion_tokens"] == 5


@ENDPOINTS
def test_several_choices(server, path, body):
    body = body | {"n": 3, "temperature": 1.0, "seed": 7}
    whole = post(server, path, body)
    texts = [whole_text(choice) for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    chunks = stream(server.client, path, body)
    assert [text_of(chunks, index) for index in range(3)] == texts
    assert [finish_of(chunks, index) for index in range(3)] == [["length"]] * 3
    assert whole["usage"]["completion_tokens"] == 36


def test_list_prompts_and_token_prompts(server):
    ids = server.client.post("/tokenize", json={"prompt": "Hello"}).json()["tokens"]
    answer = post(server, COMPLETIONS, {"prompt": ["Hello", "Bye"], "max_tokens": 4, "n": 2, "seed": 1})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == len(ids) + 3
    one = post(server, COMPLETIONS, {"prompt": "Hello", "max_tokens": 4})
    for prompt in (ids, [ids, [9]]):
        same = post(server, COMPLETIONS, {"prompt": prompt, "max_tokens": 4})
        assert same["choices"][0]["text"] == one["choices"][0]["text"]


@pytest.mark.parametrize("prompt", ["Hello", [70, 71, 72]])
def test_echo(server, prompt):
    body = {"prompt": prompt, "max_tokens": 3}
    plain = post(server, COMPLETIONS, body)["choices"][0]["text"]
    echoed = post(server, COMPLETIONS, body | {"echo": True})["choices"][0]["text"]
    ids = {"tokens": prompt}
    shown = prompt if prompt == "Hello" else server.client.post("/detokenize", json=ids).json()["prompt"]
    assert echoed == shown + plain
    assert text_of(stream(server.client, COMPLETIONS, body | {"echo": True})) == echoed


def test_chat_logprobs(server):
    body = {"messages": HELLO, "max_tokens": 5, "logprobs": True, "top_logprobs": 3}
    content = post(server, CHAT, body)["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["token"] == entry["token"]
    chunks = stream(server.client, CHAT, body)
    parts = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert [entry for part in parts for entry in part["content"]] == content


def test_completion_logprobs(server):
    body = {"prompt": "Hello", "max_tokens": 5, "logprobs": 2}
    choice = post(server, COMPLETIONS, body)["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"] == [sum(map(len, logprobs["tokens"][:i])) for i in range(5)]
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert len(top) == 2 and token in top
    chunks = stream(server.client, COMPLETIONS, body)
    parts = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert {name: [value for part in parts for value in part[name]] for name in logprobs} == logprobs


def test_logprobs_end_with_the_text_at_a_stop_string(server):
    body = {"messages": HELLO, "max_tokens": 50, "logprobs": True, "stop": ["9"]}
    answer = post(server, CHAT, body)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"]
    assert "".join(entry["token"] for entry in content).startswith(answer["choices"][0]["message"]["content"])


@ENDPOINTS
def test_usage_in_streams(server, path, body):
    whole = post(server, path, body)["usage"]
    plain = stream(server.client, path, body)
    assert all("usage" not in chunk for chunk in plain)
    once = stream(server.client, path, body | {"stream_options": {"include_usage": True}})
    assert [chunk["usage"] for chunk in once[:-1]] == [None] * (len(once) - 1)
    assert once[-1]["choices"] == []
    assert once[-1]["usage"]["completion_tokens"] == whole["completion_tokens"] == 12
    assert once[-1]["usage"]["total_tokens"] == whole["total_tokens"]
    options = {"include_usage": True, "continuous_usage_stats": True}
    always = stream(server.client, path, body | {"stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in always]
    assert counts == sorted(counts)
    assert counts[-1] == 12
    # Every token is a word; of a server that was late, several are one piece.
    places = [place for place, chunk in enumerate(always) if text_of([chunk])]
    assert [counts[place] for place in places] == [len(text_of(always[: place + 1]).split()) for place in places]


def test_cached_tokens_on_a_repeat(server):
    body = {"prompt": "A prompt with more than two blocks of sixteen tokens each in it", "max_tokens": 2}
    first = post(server, COMPLETIONS, body | {"cache_salt": "test"})["usage"]
    again = post(server, COMPLETIONS, body | {"cache_salt": "test"})["usage"]
    other = post(server, COMPLETIONS, body | {"cache_salt": "other"})["usage"]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in (first, again, other)] == [0, 48, 0]


def test_the_context_is_a_limit_and_a_default(server):
    chat = post(server, CHAT, {"messages": HELLO})
    assert chat["usage"]["total_tokens"] == 1024
    assert chat["choices"][0]["finish_reason"] == "length"
    long = server.client.post(COMPLETIONS, json={"prompt": "a" * 1020, "max_tokens": 5})
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert post(server, COMPLETIONS, {"prompt": "a" * 1020, "max_tokens": 4})["usage"]["total_tokens"] == 1024


def test_text_of_many_scripts_survives(server):
    text = 'naïve 日本語 🙂 \u0000 \\ " <|im_start|>'
    ids = server.client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert max(ids) < VOCAB_SIZE
    body = {"prompt": text, "max_tokens": 1, "echo": True}
    assert post(server, COMPLETIONS, body)["choices"][0]["text"].startswith(text)
    assert text_of(stream(server.client, COMPLETIONS, body)).startswith(text)


def test_ids_are_echoed_and_make_the_answers_id(server):
    response = server.client.post(
        CHAT, json={"messages": HELLO, "max_tokens": 1}, headers={"x-request-id": "my-request.1"}
    )
    assert response.headers["x-request-id"] == "my-request.1"
    assert response.json()["id"] == "chatcmpl-my-request.1"
    odd = server.client.post(COMPLETIONS, json={"prompt": "a"}, headers={"x-request-id": "no spaces, please"})
    assert odd.headers["x-request-id"] != "no spaces, please"
    assert odd.json()["id"] == f"cmpl-{odd.headers['x-request-id']}"


def test_ignored_parameters_are_named(server):
    body = {"prompt": "a", "max_tokens": 1, "zeta": 1, "alpha": 2}
    assert server.client.post(COMPLETIONS, json=body).headers["x-trtserve-ignored-params"] == "alpha, zeta"
    with server.client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as response:
        assert response.headers["x-trtserve-ignored-params"] == "alpha, zeta"
        response.read()
