"""Every setting, with its unit, bounds and default. Data only; `trtserve.settings.load` fills it in.

Flags, environment variables (`TRTSERVE_` + the name) and YAML keys are the field names; ``-`` and ``_`` are alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, field_validator, model_validator
from pydantic_settings import BaseSettings, CliPositionalArg, CliSuppress, SettingsConfigDict

DEFAULT_MODEL = "smollm2-135m-instruct"

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
"""The name of a plugin."""

Seconds = Annotated[float, Field(gt=0, le=86_400)]


Coefficients = Annotated[tuple[float, float, float], Field(description="constant, linear, quadratic")]


MAX_TRANSFER_ROWS = 2**22
"""KV blocks that a worker can hold for others; the bound of its messages."""


class PinnedEstimates(BaseModel):
    """What the router is to take as given instead of learning it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output_tokens: float | None = Field(default=None, gt=0, le=1e9, description="mean length of an answer, tokens")
    reuse_probability: float | None = Field(
        default=None, ge=0, le=1, description="that a stored KV block is used again before it is evicted"
    )
    block_life: float | None = Field(
        default=None, gt=0, le=1e9, description="mean age at which a block is used again, s"
    )
    prefill_ms: Coefficients | None = Field(
        default=None, description="pass time for n new prompt tokens: constant, times n, times n squared"
    )
    decode_ms: Coefficients | None = Field(
        default=None, description="pass time at KV use u, 0 to 1: constant, times u, times u squared"
    )

    @model_validator(mode="after")
    def _both_pass_times(self) -> PinnedEstimates:
        if (self.prefill_ms is None) != (self.decode_ms is None):
            raise ValueError("prefill_ms and decode_ms make one pass time together; give both or neither")
        return self


class RoleSettings(BaseModel):
    """What the engines of one role have otherwise than the settings of the same names say; None: as those."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = None
    num_blocks: int | None = Field(default=None, ge=1, le=2**31 - 1)
    kv_cache_gib: float | None = Field(default=None, gt=0, le=4096)
    max_num_seqs: int | None = Field(default=None, ge=1, le=65_536)
    max_num_tokens: int | None = Field(default=None, ge=1, le=1_048_576)
    max_seq_len: int | None = Field(default=None, ge=2, le=16_777_216)
    enable_prefix_caching: bool | None = None
    engine_options: dict[str, Any] = Field(default_factory=dict, description="on top of engine_options, name=value")

    @model_validator(mode="after")
    def _one_block_source(self) -> RoleSettings:
        if self.num_blocks is not None and self.kv_cache_gib is not None:
            raise ValueError("num_blocks and kv_cache_gib both say how large the KV cache is; give one of them")
        return self


class Settings(BaseSettings):
    """The whole deployment: what is served, by which workers, and how."""

    model_config = SettingsConfigDict(
        env_prefix="TRTSERVE_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    # What is served
    model: CliPositionalArg[str] = Field(
        DEFAULT_MODEL, min_length=1, description="a Hugging Face folder, a hub id, or the alias of the default model"
    )
    served_model_name: str | None = Field(
        None, min_length=1, max_length=256, description="the name that clients use; default: MODEL's last part"
    )
    cache_dir: Path | None = Field(None, description="where fetched models are kept; default: XDG cache/trtserve")

    # Shape of the deployment
    mode: Name = Field("agg", description="agg or disagg, or a plugin's")
    engine: Name = Field("torch", description="torch, sim or tensorrt_llm, or a plugin's")
    router: Name = Field(
        "kv", description="kv, kv_arrival, least_loaded, round_robin or random, or a plugin's routing policy"
    )
    transfer: Name = Field("auto", description="how KV moves between workers: auto, shm, ucx, nixl or cupy_ipc")
    launcher: Name = Field("local", description="what starts worker processes")
    workers: int = Field(1, ge=0, le=1024, description="aggregated workers; 0: they are started by hand")
    prefill_workers: int = Field(1, ge=0, le=1024, description="prefill workers (mode disagg); 0: started by hand")
    decode_workers: int = Field(1, ge=0, le=1024, description="decode workers (mode disagg); 0: started by hand")
    disagg_policy: Literal["auto", "always", "never"] = Field(
        "auto", description="whether prompts are computed on prefill workers: always, never, or where it is cheaper"
    )

    kv_transfer_tokens: int | None = Field(
        None,
        ge=1,
        le=2**31 - 1,
        description="tokens whose KV a worker can hold for others, or take from them, at a time; "
        "default: a quarter of its KV cache, and one longest sequence at least",
    )

    # Engines
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="weights and KV cache")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    gpus: str | None = Field(
        None,
        pattern=r"^\d{1,4}(,\d{1,4})*$",
        description="one GPU for each worker, in the order in which --dry-run lists them, such as 0,1,2",
    )
    block_size: int = Field(16, ge=1, le=1024, description="tokens in a KV block; tensorrt_llm: 32")
    num_blocks: int | None = Field(None, ge=1, le=2**31 - 1, description="KV blocks of a worker")
    kv_cache_gib: float | None = Field(None, gt=0, le=4096, description="KV memory of a worker, GiB")
    max_num_seqs: int = Field(256, ge=1, le=65_536, description="sequences that a worker runs at once")
    max_num_tokens: int | None = Field(
        None,
        ge=1,
        le=1_048_576,
        description="tokens in one pass of a worker; default: the engine's (torch and sim: 512)",
    )
    max_seq_len: int | None = Field(None, ge=2, le=16_777_216, description="prompt and output tokens of one sequence")
    enable_prefix_caching: bool = Field(True, description="reuse the KV of equal prompt beginnings")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="of engines and policies where a request gives none")
    engine_options: dict[str, Any] = Field({}, description="the engine's own options, name=value")
    prefill: RoleSettings = Field(
        default_factory=RoleSettings, description="what engines of prefill workers have otherwise"
    )
    decode: RoleSettings = Field(
        default_factory=RoleSettings, description="what engines of decode workers have otherwise"
    )

    # Routing
    router_options: dict[str, Any] = Field({}, description="the routing policy's own options, name=value")
    pinned_estimates: PinnedEstimates = Field(
        default_factory=PinnedEstimates, description="what the router takes as given instead of learning it"
    )
    decision_log: Path | None = Field(None, description="file that gets every routing decision, a JSON object a line")

    # HTTP
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=0, le=65_535, description="0: any free port")
    api_key: CliSuppress[SecretStr | None] = Field(None, description="from the environment only: TRTSERVE_API_KEY")
    api_key_file: Path | None = Field(None, description="file with one API key a line")
    max_body_mib: float = Field(32, gt=0, le=1024, description="largest request body, MiB")
    max_header_kib: float = Field(64, ge=1, le=1024, description="largest request head, KiB")
    keep_alive_timeout: Seconds = Field(75, description="seconds an idle connection stays open")
    request_timeout: Seconds = Field(600, description="seconds from arrival to the end of an answer")
    max_buffered_kib: float = Field(1024, ge=16, le=1_048_576, description="unsent output of one slow client, KiB")
    unknown_params: Literal["reject", "warn", "ignore"] = Field("warn", description="unknown fields in a body")
    chat_template: Path | None = Field(None, description="file with a chat template to use instead of the model's")
    max_logprobs: int = Field(20, ge=0, le=100, description="most alternatives per token that a client may ask for")

    # Admission
    max_queued_requests: int = Field(1024, ge=0, le=10_000_000, description="waiting for a worker; more get 503")
    max_queued_tokens: int = Field(8_000_000, ge=1, description="prompt tokens of those; more get 503")

    # Workers
    worker_endpoint: str | None = Field(
        None, pattern=r"^(ipc|tcp)://", description="ZeroMQ address for workers; default: ipc in a private folder"
    )
    worker_token: CliSuppress[SecretStr | None] = Field(
        None, description="from the environment only: TRTSERVE_WORKER_TOKEN"
    )
    worker_token_file: Path | None = Field(
        None, description="file with the secret that workers started by hand show; default: a new one"
    )
    worker_start_timeout: Seconds = Field(1800, description="seconds from start to ready")
    warm_up_timeout: float = Field(10, ge=0, le=3600, description="seconds after which no further warm-up pass starts")
    worker_silence_timeout: Seconds = Field(10, description="seconds without a heartbeat until a worker is lost")
    worker_stall_timeout: Seconds = Field(120, description="seconds without a step, with work pending, until lost")
    worker_drain_timeout: Seconds = Field(30, description="seconds for a worker's requests when its role is changed")
    log_dir: Path | None = Field(None, description="where workers' logs stay; default: a private folder, removed")

    # Process
    shutdown_timeout: float = Field(30, ge=0, le=86_400, description="seconds for running requests after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="of the server and workers")
    dry_run: bool = Field(False, description="print the settings and the plan of processes and ports, start nothing")

    @model_validator(mode="after")
    def _one_block_source(self) -> Settings:
        if self.num_blocks is not None and self.kv_cache_gib is not None:
            raise ValueError("num_blocks and kv_cache_gib both say how large the KV cache is; give one of them")
        return self

    @field_validator("api_key", "worker_token")
    @classmethod
    def _is_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None and not secret.get_secret_value().strip():
            raise ValueError("is empty, which anyone can guess; give a secret, or unset the variable")
        return secret

    @model_validator(mode="after")
    def _one_device_source(self) -> Settings:
        if self.gpus is not None and self.device not in ("auto", "cuda"):
            raise ValueError(f"gpus and device {self.device} both say where workers run; give one of them")
        return self

    @model_validator(mode="after")
    def _rows_for_transfers(self) -> Settings:
        tokens = self.kv_transfer_tokens
        if tokens is not None and not self.block_size <= tokens <= MAX_TRANSFER_ROWS * self.block_size:
            raise ValueError(
                f"kv_transfer_tokens {tokens} is not 1 to {MAX_TRANSFER_ROWS} KV blocks of {self.block_size} tokens"
            )
        return self


SECTIONS = frozenset({"prefill", "decode", "pinned_estimates"})
"""Settings that hold settings."""

MAPPINGS = frozenset({"engine_options", "router_options"})
"""Settings that hold a plugin's own options, by name."""


class WorkerSettings(Settings):
    """A worker's settings: the server's, and where it belongs."""

    connect: str = Field(pattern=r"^(ipc|tcp)://", description="ZeroMQ address of the server")
    worker_id: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}$", description="its name, such as agg-0")
    role: Literal["agg", "prefill", "decode"] = Field("agg", description="what it does for requests")
    engine_role: Literal["agg", "prefill", "decode"] | None = Field(
        None, description="the role that its engine is made for; default: its role"
    )
    parent_pid: int | None = Field(None, ge=1, description="end when this process, its parent, ends")
    connect_timeout: Seconds = Field(60, description="seconds to wait for the server's answer")
