"""Texts and conversations on which two implementations are compared when a model is loaded.

Chosen for where such implementations have differed: digits, runs of whitespace, contractions, scripts without spaces,
combining marks, joined emoji, special tokens in the text, long runs of one character.
"""

from __future__ import annotations

from typing import Any

PROBES: tuple[str, ...] = (
    "",
    "Hello world",
    " leading and trailing ",
    "tabs\t\tand  double   spaces\n\n\nlines\r\n",
    "I'll say it's they've won't DON'T 'tis",
    "In 2024, 3.14159 and 1,000,000 + 42 = ½ ²",
    'def f(x):\n\treturn x**2  # {"k": [1, 2.5e-10, null]}\n',
    "naïve café Ünïcödé e\u0301 a\u0308",
    "日本語のテキスト 漢字 한국어 ไทย हिन्दी العربية Привет",
    "🙂👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈 \ufeff\u00a0\u200b\u2003",
    "<|im_start|>user\nHi<|im_end|>\n<s></s><|endoftext|><|eot_id|>",
    "a" * 300,
    "http://example.com/a?b=c&d=%20 ALLCAPS camelCase snake_case",
    "\x00\x01\x7f ￿ \U0010ffff",
)

_USER = {"role": "user", "content": 'What is 2 < 3 & "4"?\n é '}
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Look <up> the 'weather'.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "default": None}, "days": {"type": "integer", "enum": [1, 2.0]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 1, "exact": True, "unit": None}},
        }
    ],
}

# Template variables beside the special tokens; one that a template refuses must be refused alike.
CONVERSATIONS: tuple[dict[str, Any], ...] = (
    {"messages": [_USER], "add_generation_prompt": True},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            _USER,
            {"role": "assistant", "content": "<think>\nwell\n</think>\n\nYes. "},
            {"role": "user", "content": "Sure?"},
        ],
        "add_generation_prompt": False,
    },
    {
        "messages": [
            _USER,
            _CALL,
            {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": '{"sun": true}'},
        ],
        "tools": [_TOOL],
        "add_generation_prompt": True,
    },
)
