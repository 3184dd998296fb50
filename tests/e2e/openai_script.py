"""What a user of the OpenAI client does: run with `BASE_URL MODEL`, under each of its major versions.

Strict validation makes the client complain of every field that is not as its types say.
"""

from __future__ import annotations

import sys

import openai

MESSAGES: list = [{"role": "user", "content": "Hello"}]


def chat(client: openai.OpenAI, model: str) -> None:
    asked = {"model": model, "messages": MESSAGES, "max_completion_tokens": 8, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    choice = whole.choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    assert len(choice.logprobs.content) == whole.usage.completion_tokens == 8
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    text, entries, usages, reasons = "", 0, [], []
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usages += [chunk.usage] if chunk.usage else []
        for part in chunk.choices:
            text += part.delta.content or ""
            entries += len(part.logprobs.content) if part.logprobs else 0
            reasons += [part.finish_reason] if part.finish_reason else []
    assert (text, entries, reasons) == (choice.message.content, 8, ["length"])
    assert [usage.total_tokens for usage in usages] == [whole.usage.total_tokens]
    assert usages[0].prompt_tokens_details.cached_tokens is not None


def completions(client: openai.OpenAI, model: str) -> None:
    asked = {"model": model, "prompt": "Hello", "max_tokens": 8, "logprobs": 2}
    whole = client.completions.create(**asked)
    choice = whole.choices[0]
    assert len(choice.logprobs.tokens) == whole.usage.completion_tokens == 8
    text, usages = "", []
    # The client's type of a completion chunk knows no finish_reason of null, which OpenAI's own streams have.
    with openai.OpenAI(base_url=client.base_url, api_key="none", max_retries=0, timeout=20) as lenient:
        chunks = list(lenient.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert [part.finish_reason for chunk in chunks for part in chunk.choices if part.finish_reason] == ["length"]
    for chunk in chunks:
        usages += [chunk.usage] if chunk.usage else []
        text += "".join(part.text for part in chunk.choices)
    assert text == choice.text
    assert [usage.total_tokens for usage in usages] == [whole.usage.total_tokens]


def errors(client: openai.OpenAI, model: str) -> None:
    for call, kind, code in [
        (lambda: client.models.retrieve("other"), openai.NotFoundError, "model_not_found"),
        (
            lambda: client.chat.completions.create(model=model, messages=MESSAGES, temperature=3),
            openai.BadRequestError,
            "invalid_value",
        ),
    ]:
        try:
            call()
        except kind as error:
            assert error.code == code, error.code
        else:
            raise AssertionError(f"no {kind.__name__}")


def helpers(client: openai.OpenAI, model: str) -> None:
    """The client's own reader of streams, which puts the pieces together again."""
    asked = {"model": model, "messages": MESSAGES, "max_completion_tokens": 200, "n": 2, "stop": ["9"]}
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    assert [choice.index for choice in final.choices] == [0, 1]
    assert all(choice.message.content for choice in final.choices)


def main() -> None:
    base_url, model = sys.argv[1:]
    with openai.OpenAI(
        base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=20, _strict_response_validation=True
    ) as client:
        assert [served.id for served in client.models.list()] == [model]
        for use in (chat, completions, errors, helpers):
            use(client, model)
    print(openai.__version__)


if __name__ == "__main__":
    main()
