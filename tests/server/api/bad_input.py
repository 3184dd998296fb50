"""THE table of bad input: what is sent where, and what the answer must be. Plain data, for the schema's tests and for
tests over HTTP alike. The server it supposes serves one model, "sim", with 1,000 tokens in its vocabulary, and takes
unknown parameters with a warning."""

from __future__ import annotations

from tests.server.api.bad_fields import LENGTH_AND_STOP, SAMPLING, SHAPE, UNSUPPORTED_FIELDS
from tests.server.api.bad_row import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    HELLO,
    JSON,
    MISSING,
    MODEL,
    TOKENIZE,
    TYPE,
    UNSUPPORTED,
    VALUE,
    BadInput,
    bad_chat,
    bad_completion,
    bad_messages,
    calling,
)

_BYTES = [
    BadInput(endpoint, raw, 400, None, JSON)
    for endpoint, raw in [
        (CHAT, b""),
        (CHAT, b"{"),
        (CHAT, b"null"),
        (CHAT, b"[]"),
        (CHAT, b'"text"'),
        (CHAT, b"\xff\xfe"),
        (CHAT, b'{"model": "\xc3\x28"}'),
        (CHAT, b'{"model": "\\ud800"}'),
        (CHAT, b'{"temperature": NaN}'),
        (CHAT, b'{"temperature": Infinity}'),
        (CHAT, b'{"temperature": 1e999}'),
        (CHAT, b"{'model': 'sim'}"),
        (CHAT, b'{"model": "sim",}'),
        (CHAT, b"\xef\xbb\xbf{}"),
        (CHAT, b'{"a":' * 3000 + b"1" + b"}" * 3000),
        (COMPLETIONS, b'{"prompt": ' + b"[" * 100_000),
        (COMPLETIONS, b"12"),
        (TOKENIZE, b"prompt=hello"),
        (DETOKENIZE, b"true"),
    ]
]

_MODELS = [
    bad_chat({f"unknown{i}": 1 for i in range(600)}, None),
    BadInput(CHAT, {"model": "other", "messages": HELLO}, 404, "model", "model_not_found"),
    BadInput(CHAT, {"model": "", "messages": HELLO}, 404, "model", "model_not_found"),
    BadInput(COMPLETIONS, {"model": "SIM", "prompt": "a"}, 404, "model", "model_not_found"),
    BadInput(TOKENIZE, {"model": "other", "prompt": "a"}, 404, "model", "model_not_found"),
    BadInput(DETOKENIZE, {"model": "other", "tokens": [1]}, 404, "model", "model_not_found"),
    bad_chat({"model": 5}, "model", TYPE),
]

_MESSAGES = [
    BadInput(CHAT, {"model": MODEL}, 400, "messages", MISSING),
    BadInput(CHAT, {"model": MODEL, "prompt": "Hello"}, 400, "messages", MISSING),
    bad_messages([], "messages"),
    bad_messages(None, "messages", TYPE),
    bad_messages("Hello", "messages", TYPE),
    bad_messages({"role": "user"}, "messages", TYPE),
    bad_messages(["Hello"], "messages[0]", TYPE),
    bad_messages([*HELLO, None], "messages[1]", TYPE),
    bad_messages([{"content": "a"}], "messages[0].role", MISSING),
    bad_messages([{"role": "robot", "content": "a"}], "messages[0].role"),
    bad_messages([{"role": 1, "content": "a"}], "messages[0].role"),
    bad_messages([{"role": "user"}], "messages[0].content", MISSING),
    bad_messages([{"role": "user", "content": None}], "messages[0].content", TYPE),
    bad_messages([*HELLO, {"role": "assistant", "content": None}], "messages[1].content", TYPE),
    bad_messages([{"role": "assistant", "content": None, "tool_calls": []}], "messages[0].content", TYPE),
    bad_messages([{"role": "user", "content": 5}], "messages[0].content", TYPE),
    bad_messages([{"role": "user", "content": {}}], "messages[0].content", TYPE),
    bad_messages([{"role": "user", "content": []}], "messages[0].content"),
    bad_messages([{"role": "user", "content": ["a"]}], "messages[0].content[0]", TYPE),
    bad_messages([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", MISSING),
    bad_messages([{"role": "user", "content": [{"text": "a"}]}], "messages[0].content[0].type", MISSING),
    bad_messages([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0].text", TYPE),
    bad_messages(
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}],
        "messages[0].content[1].type",
    ),
    bad_messages([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0].type"),
    bad_messages([{"role": "user", "content": "a", "name": 5}], "messages[0].name", TYPE),
    bad_messages([{"role": "assistant", "content": "a", "reasoning": 5}], "messages[0].reasoning", TYPE),
    bad_messages(calling("not json"), "messages[1].tool_calls[0].function.arguments"),
    bad_messages(calling("[1]"), "messages[1].tool_calls[0].function.arguments"),
    bad_messages(calling(5), "messages[1].tool_calls[0].function.arguments", TYPE),
    bad_messages(
        [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}],
        "messages[0].tool_calls[0].function.name",
        MISSING,
    ),
]

_PROMPTS = [
    BadInput(COMPLETIONS, {"model": MODEL}, 400, "prompt", MISSING),
    BadInput(COMPLETIONS, {"model": MODEL, "messages": HELLO}, 400, "prompt", MISSING),
    bad_completion({"prompt": None}, "prompt", TYPE),
    bad_completion({"prompt": ""}, "prompt"),
    bad_completion({"prompt": []}, "prompt"),
    bad_completion({"prompt": [""]}, "prompt[0]"),
    bad_completion({"prompt": [[]]}, "prompt[0]"),
    bad_completion({"prompt": [[1], []]}, "prompt[1]"),
    bad_completion({"prompt": 5}, "prompt", TYPE),
    bad_completion({"prompt": {"text": "a"}}, "prompt", TYPE),
    bad_completion({"prompt": [True]}, "prompt[0]", TYPE),
    bad_completion({"prompt": [1.0]}, "prompt[0]", TYPE),
    bad_completion({"prompt": [None]}, "prompt[0]", TYPE),
    bad_completion({"prompt": ["a", 1]}, "prompt[1]", TYPE),
    bad_completion({"prompt": [1, "a"]}, "prompt[1]", TYPE),
    bad_completion({"prompt": [[1], 2]}, "prompt[1]", TYPE),
    bad_completion({"prompt": [[1, "a"]]}, "prompt[0][1]", TYPE),
    bad_completion({"prompt": [-1]}, "prompt[0]"),
    bad_completion({"prompt": [1, 1000]}, "prompt[1]"),
    bad_completion({"prompt": [[1], [2**40]]}, "prompt[1][0]"),
    bad_completion({"prompt": ["a"] * 129}, "prompt"),
    bad_completion({"prompt": ["a"] * 65, "n": 2}, "n"),
    bad_completion({"logprobs": 6}, "logprobs"),
    bad_completion({"logprobs": -1}, "logprobs"),
    bad_completion({"logprobs": True}, "logprobs", TYPE),
    bad_completion({"echo": "yes"}, "echo", TYPE),
    bad_completion({"echo": True, "logprobs": 1}, "echo", UNSUPPORTED),
    bad_completion({"top_logprobs": 1}, "top_logprobs", UNSUPPORTED),
    bad_completion({"suffix": "end"}, "suffix", UNSUPPORTED),
    bad_completion({"best_of": 2}, "best_of", UNSUPPORTED),
    bad_completion({"prompt_embeds": "AAAA"}, "prompt_embeds", UNSUPPORTED),
]

_TOKENS = [
    BadInput(TOKENIZE, {"model": MODEL}, 400, "prompt", MISSING),
    BadInput(TOKENIZE, {"model": MODEL, "prompt": "a", "messages": HELLO}, 400, "prompt", VALUE),
    BadInput(TOKENIZE, {"model": MODEL, "prompt": ["a"]}, 400, "prompt", TYPE),
    BadInput(TOKENIZE, {"model": MODEL, "messages": []}, 400, "messages", VALUE),
    BadInput(TOKENIZE, {"model": MODEL, "messages": [{"role": "x"}]}, 400, "messages[0].role", VALUE),
    BadInput(TOKENIZE, {"model": MODEL, "prompt": "a", "add_special_tokens": 1}, 400, "add_special_tokens", TYPE),
    BadInput(TOKENIZE, {"model": MODEL, "prompt": "a", "tools": [{}]}, 400, "tools", UNSUPPORTED),
    BadInput(DETOKENIZE, {"model": MODEL}, 400, "tokens", MISSING),
    BadInput(DETOKENIZE, {"model": MODEL, "tokens": None}, 400, "tokens", TYPE),
    BadInput(DETOKENIZE, {"model": MODEL, "tokens": "1 2"}, 400, "tokens", TYPE),
    BadInput(DETOKENIZE, {"model": MODEL, "tokens": [1, "2"]}, 400, "tokens[1]", TYPE),
    BadInput(DETOKENIZE, {"model": MODEL, "tokens": [1, 1000]}, 400, "tokens[1]", VALUE),
    BadInput(DETOKENIZE, {"model": MODEL, "tokens": [-1]}, 400, "tokens[0]", VALUE),
]

BAD_INPUT: list[BadInput] = [
    *_BYTES,
    *_MODELS,
    *_MESSAGES,
    *SAMPLING,
    *LENGTH_AND_STOP,
    *SHAPE,
    *_PROMPTS,
    *UNSUPPORTED_FIELDS,
    *_TOKENS,
]
