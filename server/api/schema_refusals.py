"""Fields that are not in our bodies: which are refused, which are quietly fine, and what happens to the unknown.

A field that changes the output must never be dropped in silence, so those that other servers know are refused with a
hint, unless their value is one that changes nothing. Any other name is ignored and reported, or refused, as the
setting `unknown_params` says. Names: OpenAI's API reference, and the request classes of vLLM, SGLang, TensorRT-LLM's
serve command and Dynamo.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from trtserve.server.errors import InvalidRequest

UnknownParams: TypeAlias = Literal["reject", "warn", "ignore"]
"""What to do with a field that nobody knows. warn: ignore it and say so, in the log and in a header of the answer."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a field is refused, and values of it that are as good as its absence (null always is)."""

    hint: str
    neutral: tuple[object, ...] = (False, "", [], {})


_NO_GRAMMAR = "constrained output is not available on this engine yet; ask for the form in the prompt"
_NO_TOOLS = "tool calling is not available on this server yet"
_NO_BEAMS = "this server samples and has no beam search; leave it out and use n for several choices"
_NO_SAMPLER = "this sampler is not available; use temperature, top_p, top_k, min_p and the penalties"
_NO_BANS = "not available; use logit_bias with -100 for each token"
_NO_MEDIA = "this server reads and writes text only"
_NO_PROMPT_SCORES = "scores of prompt tokens are not available yet; logprobs gives those of generated tokens"
_NO_TRUNCATION = "prompts are never shortened here; shorten it in the client, POST /tokenize counts its tokens"
_NO_THINKING = "not available yet; chat_template_kwargs reaches the model's template, such as enable_thinking"
_NO_IDS = "token ids are not returned with answers; POST /tokenize gives those of a text"
_NO_STOP = "only plain stop strings and stop_token_ids end an answer"
_NO_INTERNALS = "an internal field of another server"
_NO_ADAPTERS = "adapters are not available yet; name a served model in `model`"
_NO_SEARCH = "this server has no web access and no document store; put the text into a message"

_GROUPS: tuple[tuple[str, str], ...] = (
    (f'use "response_format" once it is there: {_NO_GRAMMAR}', "guided_json guided_regex guided_choice guided_grammar"),
    (f'use "response_format" once it is there: {_NO_GRAMMAR}', "guided_decoding_backend guided_whitespace_pattern"),
    (
        _NO_GRAMMAR,
        "structured_outputs structural_tag json_schema json_object regex ebnf grammar choice guided_decoding",
    ),
    (_NO_TOOLS, "tools functions"),
    (_NO_BEAMS, "use_beam_search beam_width beam_search_diversity_rate diversity_penalty num_beams"),
    (_NO_SAMPLER, "logits_processors logits_processor_args custom_logit_processor custom_params top_a typical_p tfs"),
    (_NO_SAMPLER, "mirostat mirostat_tau mirostat_eta dry_multiplier xtc_probability no_repeat_ngram_size"),
    (
        _NO_SAMPLER,
        "top_p_min top_p_decay top_p_reset_ids epsilon_cutoff eta_cutoff embedding_bias repetition_detection",
    ),
    (_NO_BANS, "bad_words bad_words_ids allowed_token_ids suppress_tokens"),
    (
        _NO_MEDIA,
        "audio prediction mm_processor_kwargs media_io_kwargs multi_modal_data multi_modal_uuids images videos",
    ),
    (_NO_PROMPT_SCORES, "prompt_logprobs return_context_logits return_generation_logits logprob_start_len"),
    (_NO_PROMPT_SCORES, "return_logprob logprob_token_ids token_ids_logprob return_hidden_states"),
    (_NO_TRUNCATION, "truncate_prompt_tokens truncation_side truncation"),
    (_NO_THINKING, "thinking_token_budget reasoning_effort reasoning thinking enable_thinking thinking_budget"),
    (_NO_IDS, "return_token_ids return_tokens_as_token_ids return_routed_experts"),
    (_NO_STOP, "stop_regex no_stop_trim stop_words stop_words_ids"),
    (_NO_INTERNALS, "disaggregated_params kv_transfer_params bootstrap_host bootstrap_port bootstrap_room nvext"),
    (_NO_INTERNALS, "conversation_params session_params vllm_xargs extra_args data_parallel_rank"),
    (_NO_ADAPTERS, "lora lora_request lora_path lora_name lora_id adapter adapter_id prompt_adapter_request"),
    (_NO_SEARCH, "web_search_options documents"),
    ("request templates are off; the model's own template is used", "chat_template"),
    ("filling in the middle is not available; send a prompt alone", "suffix"),
    ("embeddings are not read; send text or token ids as the prompt", "prompt_embeds input_embeds"),
    ("send token ids as the `prompt` of /v1/completions", "prompt_token_ids input_ids"),
    ('the OpenAI name is "max_tokens"', "max_new_tokens max_length n_predict"),
    ('the OpenAI name is "min_tokens"', "min_new_tokens min_length"),
    ('the OpenAI name is "repetition_penalty"', "repeat_penalty"),
)

# Numbers that turn a thing off.
_OFF = {
    0: "mirostat dry_multiplier xtc_probability no_repeat_ngram_size top_a beam_search_diversity_rate "
    "diversity_penalty epsilon_cutoff eta_cutoff min_new_tokens min_length",
    1: "beam_width num_beams typical_p tfs repeat_penalty",
}
_OFF_NUMBERS = {name: number for number, names in _OFF.items() for name in names.split()}

REFUSALS: Mapping[str, Refusal] = {
    **{
        name: Refusal(hint, (_OFF_NUMBERS[name],)) if name in _OFF_NUMBERS else Refusal(hint)
        for hint, names in _GROUPS
        for name in names.split()
    },
    "response_format": Refusal(_NO_GRAMMAR, ({"type": "text"}, {})),
    "tool_choice": Refusal(_NO_TOOLS, ("none",)),
    "function_call": Refusal(_NO_TOOLS, ("none",)),
    "modalities": Refusal(_NO_MEDIA, (["text"], [])),
    "length_penalty": Refusal(_NO_BEAMS, (1,)),
    "early_stopping": Refusal(_NO_BEAMS, (False, 0)),
    "num_return_sequences": Refusal("use n", (1,)),
    "do_sample": Refusal("use temperature 0 for greedy choice", (True,)),
    "priority": Refusal("there is no priority queue yet; requests are served in order of arrival", (0,)),
    "spaces_between_special_tokens": Refusal("special tokens are always kept apart", (True,)),
    "detokenize": Refusal("answers are always text", (True,)),
    "include_reasoning": Refusal("reasoning is part of the text; it cannot be left out yet", (True,)),
    "separate_reasoning": Refusal("reasoning is part of the text; it is not told apart yet", (False,)),
    "stream_reasoning": Refusal("reasoning is part of the text; it is not told apart yet", (True,)),
    "best_of": Refusal("only as many choices as n are made; leave best_of out or send the value of n", ()),
    "echo": Refusal("only /v1/completions puts the prompt before the answer", (False,)),
    "top_logprobs": Refusal('in /v1/completions the name is "logprobs", with the number as its value', (0,)),
    "prompt": Refusal('/v1/chat/completions takes "messages"', ()),
    "messages": Refusal('/v1/completions takes "prompt"', ()),
}

# Of no effect on the output, and sent by well-behaved clients: not worth a warning.
QUIET: frozenset[str] = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "parallel_tool_calls".split()
)


def sort_out(body: Mapping[str, Any], known: frozenset[str], n: int, policy: UnknownParams) -> tuple[str, ...]:
    """The names of the ignored fields of a body, sorted; () unless the policy is to warn.

    known: the fields that our model of the body has. Raises InvalidRequest for a field that changes the output and
    cannot be honoured, and for an unknown one where the policy is to reject it.
    """
    if body.keys() <= known:
        return ()
    unknown = []
    for name in body.keys() - known - QUIET:
        refusal, value = REFUSALS.get(name), body[name]
        if value is None:
            continue
        if refusal is None:
            unknown.append(name)
        elif not _is_neutral(value, (n,) if name == "best_of" else refusal.neutral):
            raise InvalidRequest(
                f"`{name}` is not supported: {refusal.hint}.", param=name, code="unsupported_parameter"
            )
    if unknown and policy == "reject":
        name = min(unknown)[:64]
        raise InvalidRequest(
            f"`{name}` is not a parameter of this server; remove it, or start the server with unknown_params=warn.",
            param=name,
            code="unknown_parameter",
        )
    return tuple(sorted(unknown)) if policy == "warn" else ()


def _is_neutral(value: object, neutral: Iterable[object]) -> bool:
    # True == 1 in Python, but a client that sends one does not mean the other.
    return any(isinstance(value, bool) is isinstance(other, bool) and value == other for other in neutral)
