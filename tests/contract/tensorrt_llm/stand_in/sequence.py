"""One sequence of a request: which tokens it has said, what of them was reported, why it ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from tensorrt_llm.executor.result import Logprob, Response
from tensorrt_llm.sampling_params import SamplingParams

from .tokens import TokenStream


@dataclass(slots=True)
class Sequence:
    stream: TokenStream
    sampling: SamplingParams
    max_tokens: int
    trims_end_token: bool
    index: int = 0
    tokens: list[int] = field(default_factory=list)
    steps: int = 0
    accepted_drafts: int = 0
    finish_reason: str | None = None
    stop_reason: int | None = None
    reported: bool = False  # that it ended
    hidden: int = 0  # tokens that the next report's difference leaves out
    _waiting: list[int] = field(default_factory=list)
    _waiting_logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    _trimmed: int = 0
    _has_reported: bool = False

    def step(self, max_new_tokens: int) -> None:
        """Say up to so many tokens; fewer where the sequence ends."""
        self.steps += 1
        before = len(self.tokens)
        for _ in range(max_new_tokens):
            if self.finish_reason is None:
                self._say()
        self.accepted_drafts += max(0, len(self.tokens) - before - 1)

    def is_due(self, streaming: bool, stream_interval: int) -> bool:
        """Whether there is something to report now: at the end, and in a stream at every n-th step."""
        if self.finish_reason is not None:
            return not self.reported
        return streaming and bool(self._waiting) and (not self._has_reported or self.steps % stream_interval == 0)

    def report(self) -> Response:
        """What was not reported yet."""
        response = Response(
            sequence_index=self.index,
            new_tokens=self._waiting,
            new_logprobs=self._waiting_logprobs,
            trimmed=self._trimmed,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            hidden=self.hidden,
            decoding_iter=self.steps,
            avg_decoded_tokens_per_iter=len(self.tokens) / self.steps if self.steps else None,
        )
        self._waiting, self._waiting_logprobs, self.hidden = [], [], 0
        self._has_reported = True
        self.reported = self.finish_reason is not None
        return response

    def leave_out(self) -> None:
        """Never report what was said so far (first_gen_tokens, where a stream begins after them)."""
        self._waiting, self._waiting_logprobs = [], []

    def _say(self) -> None:
        sampling = self.sampling
        may_end = not sampling.ignore_eos and len(self.tokens) >= (sampling.min_tokens or 0)
        token = self.stream.next(sampling.end_id if may_end and sampling.end_id not in (None, -1) else None)
        self.tokens.append(token)
        self._waiting.append(token)
        if sampling.logprobs:  # 0 is "off"
            top = self.stream.top(token, sampling.logprobs)
            ranked = enumerate(top.items(), 1)
            self._waiting_logprobs.append({alternative: Logprob(value, rank) for rank, (alternative, value) in ranked})
        if token == sampling.end_id and may_end:
            self.finish_reason, self._trimmed = "stop", int(self.trims_end_token)
        elif token in (sampling.stop_token_ids or ()):
            self.finish_reason, self.stop_reason = "stop", token
            self._trimmed = int(not sampling.include_stop_str_in_output)
        elif len(self.tokens) >= self.max_tokens:
            self.finish_reason = "length"
