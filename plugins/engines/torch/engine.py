"""The embedded engine as a `StepEngine`: from a configuration to a running `Generation`, and back to nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from trtserve.plugins.api import (
    EngineConfig,
    EngineInfo,
    KVLayout,
    KVRows,
    Request,
    RequestId,
    StepOutputs,
    TokenIds,
    WorkerLoad,
)
from trtserve.plugins.engines.torch.capacity import Capacity, plan_capacity
from trtserve.plugins.engines.torch.decode_rows import DecodeRows
from trtserve.plugins.engines.torch.generation import Generation
from trtserve.plugins.engines.torch.kv_store import KVStore
from trtserve.plugins.engines.torch.model import Model, choose_device, choose_dtype, load_model
from trtserve.plugins.engines.torch.options import TorchOptions
from trtserve.plugins.engines.torch.prefix_cache import PrefixCache
from trtserve.plugins.engines.torch.prefix_rows import PrefixRows
from trtserve.plugins.engines.torch.request_checks import MAX_LOGPROBS
from trtserve.plugins.engines.torch.sampler import Sampler
from trtserve.plugins.engines.torch.scheduler import Scheduler
from trtserve.plugins.fingerprint import model_fingerprint

LoadModel = Callable[[str, torch.dtype, torch.device, TorchOptions], Model]


class TorchEngine:
    """One model on one device: a `StepEngine` and a `KVStoreEngine`. Every call comes from the thread of `start`."""

    def __init__(self, config: EngineConfig, load: LoadModel = load_model) -> None:
        """`load` reads the model; one that is in memory already can be given instead of a folder."""
        self._config = config
        self._options = TorchOptions.model_validate(dict(config.options))
        self._load = load
        self._generation: Generation | None = None
        self._prefix_rows: PrefixRows | None = None

    def start(self, progress: Callable[[str], None]) -> EngineInfo:
        """Load the model; raises ModelRefused or ValueError with a sentence where that cannot be."""
        if self._options.num_threads is not None:
            torch.set_num_threads(self._options.num_threads)
        device, dtype = choose_device(self._config.device), choose_dtype(self._config.dtype)
        progress("loading weights")
        model = self._load(self._config.model_path, dtype, device, self._options)
        progress("allocating KV cache")
        capacity = plan_capacity(self._config, model)
        self._generation = self._assemble(model, capacity)
        self._prefix_rows = PrefixRows(self._generation.cache, self._generation.store)
        return EngineInfo(
            block_size=self._config.block_size,
            num_blocks=capacity.num_blocks,
            max_num_seqs=capacity.max_num_seqs,
            max_num_tokens=capacity.max_num_tokens,
            max_seq_len=capacity.max_seq_len,
            vocab_size=model.vocab_size,
            publishes_kv_events=self._config.enable_prefix_caching,
            caches_prefixes=self._config.enable_prefix_caching,
            max_logprobs=MAX_LOGPROBS,
        )

    def add(self, request: Request) -> None:
        """Queue a request; raises RequestRefused if it can never be served."""
        self._running.add(request)

    def abort(self, request_id: RequestId) -> None:
        """End a request and give back its blocks; the next `step` reports it. Unknown ids are ignored."""
        self._running.abort(request_id)

    def has_work(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return self._generation is not None and self._generation.has_work()

    def step(self) -> StepOutputs:
        """Run one pass."""
        return self._running.step()

    def stats(self) -> WorkerLoad:
        """The load right now; zeros when not started or closed."""
        return WorkerLoad() if self._generation is None else self._generation.stats()

    def kv_layout(self) -> KVLayout:
        """Raises FileNotFoundError or ValueError where the model folder has no fingerprint."""
        return self._kv.layout(model_fingerprint(Path(self._config.model_path)))

    def attach_rows(self, rows: KVRows) -> None:
        """Raises ValueError where the rows are not as `kv_layout` says."""
        self._kv.attach(rows)

    def stored_blocks(self, tokens: TokenIds, cache_salt: str) -> int:
        """Leading full blocks of the prompt that are in the prefix cache."""
        return self._kv.stored_blocks(tokens, cache_salt)

    def read_kv(self, tokens: TokenIds, cache_salt: str, first_block: int, rows: Sequence[int]) -> int:
        """Fill rows with blocks from `first_block` on, as far as they are stored; returns how many."""
        return self._kv.read(tokens, cache_salt, first_block, rows)

    def write_kv(self, tokens: TokenIds, cache_salt: str, first_block: int, rows: Sequence[int]) -> int:
        """Store blocks from rows; returns how many of them are in the cache now. Their events make work for `step`."""
        return self._kv.write(tokens, cache_salt, first_block, rows)

    def close(self) -> None:
        """Drop the model and the KV cache; idempotent."""
        self._generation = None
        self._prefix_rows = None

    @property
    def _kv(self) -> PrefixRows:
        if self._prefix_rows is None:
            raise RuntimeError("the torch engine has no KV: call start first, and nothing after close")
        return self._prefix_rows

    @property
    def _running(self) -> Generation:
        if self._generation is None:
            raise RuntimeError("the torch engine is not running: call start first, and nothing after close")
        return self._generation

    def _assemble(self, model: Model, capacity: Capacity) -> Generation:
        config = self._config
        store = KVStore(model.layers, capacity.num_blocks, config.block_size, model.dtype, model.device)
        cache = PrefixCache(capacity.num_blocks, config.block_size, config.enable_prefix_caching)
        scheduler = Scheduler(cache, capacity.max_num_seqs, capacity.max_num_tokens)
        sampler = Sampler(model.vocab_size, config.seed, model.device)
        return Generation(model, store, self._decode_rows(store), cache, scheduler, sampler, capacity.max_seq_len)

    def _decode_rows(self, store: KVStore) -> DecodeRows | None:
        num_blocks = int(store.num_blocks * self._options.decode_rows_share)
        # on CUDA gathering blocks costs little beside launching it
        return DecodeRows(store, num_blocks) if num_blocks and store.device.type == "cpu" else None
