"""What of the LLM's arguments the engine runs by, and the block pools they ask for."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .block_pool import BlockPool
from .environment import Environment
from .kv_events import EventBuffer
from .transfer import KVLayout

if TYPE_CHECKING:
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs


@dataclass(slots=True)
class EngineSettings:
    args: TorchLlmArgs
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    event_buffers: list[EventBuffer] = field(default_factory=list)  # one for each attention-DP rank, if events are on

    @property
    def tokens_per_block(self) -> int:
        return self.args.kv_cache_config.tokens_per_block

    @property
    def stream_interval(self) -> int:
        return self.args.stream_interval

    @property
    def enable_iter_perf_stats(self) -> bool:
        return self.args.enable_iter_perf_stats

    @property
    def guided_decoding_backend(self) -> str | None:
        return self.args.guided_decoding_backend

    @property
    def draft_tokens(self) -> int:
        """Tokens drafted in a step: of MTP next-n, of the others max_draft_len."""
        speculation = self.args.speculative_config
        if speculation is None:
            return 0
        return getattr(speculation, "num_nextn_predict_layers", None) or speculation.max_draft_len or 0

    @property
    def transceiver(self) -> str | None:
        """The backend of the KV transceiver; None turns disaggregation off, even where the block is there."""
        config = self.args.cache_transceiver_config
        return None if config is None else config.backend

    @property
    def has_events(self) -> bool:
        config = self.args.kv_cache_config
        return config.event_buffer_max_size > 0 and config.enable_block_reuse

    @property
    def num_ranks(self) -> int:
        return self.args.tensor_parallel_size if self.args.enable_attention_dp else 1

    def kv_layout(self) -> KVLayout:
        dtype = self.args.kv_cache_config.dtype
        return KVLayout(self.effective_backend(), dtype, self.tokens_per_block, self.draft_tokens)

    def effective_backend(self) -> str:
        if self.transceiver != "DEFAULT":
            return str(self.transceiver)
        for name in ("NIXL", "UCX", "MOONCAKE", "MPI"):
            if os.environ.get(f"TRTLLM_USE_{name}_KVCACHE") == "1":
                return name
        return "NIXL"

    def make_pools(self, environment: Environment) -> list[BlockPool]:
        """One pool for each attention-DP rank."""
        config = self.args.kv_cache_config
        size = config.tokens_per_block
        blocks = int(environment.kv_blocks * config.free_gpu_memory_fraction)
        if config.max_tokens is not None:
            blocks = min(blocks, config.max_tokens // size)
        host_blocks = (config.host_cache_size or 0) // (size * 1024)  # as if a token's KV had 1 KiB
        if self.has_events:
            self.event_buffers = [
                EventBuffer(
                    config.event_buffer_max_size, self.max_seq_len, rank if self.args.enable_attention_dp else None,
                    environment.drop_every_event,
                )
                for rank in range(self.num_ranks)
            ]  # fmt: skip
        return [
            BlockPool(
                max(1, blocks), host_blocks, size, config.enable_block_reuse, config.enable_partial_reuse,
                environment.hex_hashes, self.event_buffers[rank] if self.event_buffers else None,
            )
            for rank in range(self.num_ranks)
        ]  # fmt: skip
