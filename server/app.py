"""The composition root: makes every part of the server, runs them under one TaskGroup, and ends them in order."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from trtserve.plugins.manager import PluginManager
from trtserve.server.api.choice import Flusher
from trtserve.server.api.parameters import sampling_defaults
from trtserve.server.api.routes import Application
from trtserve.server.api.schema import RequestRules
from trtserve.server.api.serving import ApiKeys, HttpLimits, ServedModel, Serving
from trtserve.server.cluster import ServerCluster
from trtserve.server.console import say, say_error
from trtserve.server.deployment import Plan, WorkerCommands
from trtserve.server.errors import Overloaded
from trtserve.server.exit_codes import ExitCode
from trtserve.server.http import AddressError, serve_http
from trtserve.server.memory import settle
from trtserve.server.metrics import Metrics
from trtserve.server.model.errors import ModelError
from trtserve.server.model.folder import ModelFolder
from trtserve.server.pair_warm_up import PairWarmUp
from trtserve.server.reports import WorkerReports
from trtserve.server.requests import LiveRequests
from trtserve.server.roles import RoleChanges
from trtserve.server.router.core import RoutingCore
from trtserve.server.router.decision_log import DecisionLog
from trtserve.server.router.pinned import pinned_times, pinned_traffic
from trtserve.server.router.router import QueueLimits, Router
from trtserve.server.router.traffic import Traffic
from trtserve.server.runtime_folder import runtime_folder
from trtserve.server.text.chat_template import ChatTemplate, load_chat_template
from trtserve.server.text.special_tokens import special_tokens
from trtserve.server.text.tokenizer import load_tokenizer
from trtserve.server.workers.link import Link
from trtserve.server.workers.pool import Expectation, WorkerPool
from trtserve.server.workers.supervisor import Supervisor, SupervisorLimits, WorkerStartFailed
from trtserve.server.workers.token import given_token
from trtserve.settings.errors import SettingsError
from trtserve.settings.schema import Settings

logger = logging.getLogger(__name__)

_LAST_ANSWERS_S = 2.0


class Server:
    """One life of the server process. `run` returns the exit code when it is over and no process is left."""

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        manager: PluginManager,
        folder: ModelFolder,
        api_keys: list[str],
        bound: socket.socket,
    ) -> None:
        """Takes the bound socket."""
        self._settings = settings
        self._plan = plan
        self._folder = folder
        self._api_keys = api_keys
        self._bound = bound
        self._address = bound.getsockname()[:2]
        self._started_s = time.monotonic()
        self._metrics = Metrics()
        self._live = LiveRequests(settings.request_timeout)
        self._flusher = Flusher()
        limits = QueueLimits(settings.max_queued_requests, settings.max_queued_tokens)
        self._decision_log = _decision_log(settings)
        core = RoutingCore(
            plan.policy,
            Traffic(pinned_traffic(settings.pinned_estimates)),
            pinned_times(settings.pinned_estimates, settings.max_num_tokens),
            recorder=self._decision_log,
            resync=lambda worker_id: self._cluster.resync(worker_id),
        )
        router = Router(core, limits, self._metrics, settings.router)
        self._cluster = ServerCluster(router, self._metrics)
        self._launcher = manager.make_launcher(settings.launcher)
        self._token = given_token(settings) or secrets.token_hex(32)
        changed = self._cluster.capacity_changed
        self._pairs = PairWarmUp(lambda: list(self._pool), self._cluster, changed)
        self._pool = WorkerPool(self._expectation(), WorkerReports(router, changed, self._pairs.begin))
        self._cluster.attach(self._pool)
        self._stop_signals = 0
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._stop_http = asyncio.Event()

    def _expectation(self) -> Expectation:
        fingerprints = self._folder.fingerprints()
        return Expectation(self._token, fingerprints.model, fingerprints.tokenizer)

    async def run(self) -> ExitCode:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(_num_threads(), "compute"))
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        with runtime_folder() as folder, self._decision_log or nullcontext():
            endpoint = self._settings.worker_endpoint or f"ipc://{folder}/workers.sock"
            with Link(endpoint, self._pool.on_message, self._on_drained, self._flusher.expect_no_more) as link:
                self._pool.attach(link.send)
                return await self._serve(link.endpoint, folder)

    def _on_drained(self) -> None:
        """Tokens first: somebody waits for them."""
        self._flusher.flush()
        self._pool.account()

    async def _serve(self, endpoint: str, runtime_dir: Path) -> ExitCode:
        commands = WorkerCommands(
            self._settings,
            self._folder.path,
            runtime_dir,
            endpoint,
            self._token,
            self._plan.workers,
            self._plan.engines,
        )
        supervisor = Supervisor(
            self._launcher,
            self._pool,
            lambda client: commands.spec(client.worker_id, client.role),
            self._supervisor_limits(),
        )
        clients = [self._pool.add(worker.worker_id, worker.role) for worker in self._plan.workers]
        try:
            async with asyncio.TaskGroup() as group:
                # Workers load while the server does.
                workers = group.create_task(supervisor.run(clients), name="workers")
                application = await asyncio.to_thread(self._application)
                http = group.create_task(
                    serve_http(application, self._bound, self._settings, self._stop_http), name="http"
                )
                background = [
                    group.create_task(self._announce(), name="announce"),
                    group.create_task(self._measure_loop_delay(), name="loop-delay"),
                    group.create_task(self._cluster.extend_leases(), name="leases"),
                    group.create_task(self._pairs.run(), name="pairs"),
                ]
                if not self._plan.workers:
                    say(f"{self._url()} is up, waiting for workers at {endpoint}")
                await self._stop.wait()
                exit_code = await self._drain()
                self._stop_http.set()
                await http
                supervisor.shutdown()
                for task in (*background, workers):
                    task.cancel()
                return exit_code
        except BaseExceptionGroup as errors:
            return self._explain(errors)

    def _supervisor_limits(self) -> SupervisorLimits:
        return SupervisorLimits(
            start_s=self._settings.worker_start_timeout,
            silence_s=self._settings.worker_silence_timeout,
            stall_s=self._settings.worker_stall_timeout,
        )

    # -------------------------------------------------------------- parts that need the model

    def _application(self) -> Application:
        """Runs in a thread: reading a tokenizer takes half a second."""
        settings, folder = self._settings, self._folder
        tokenizer = load_tokenizer(folder)
        generation = folder.generation_defaults()
        vocab_size = folder.config().vocab_size or tokenizer.vocab_size
        model = ServedModel(
            name=settings.served_model_name or folder.name.rstrip("/").rpartition("/")[2],
            created=int(time.time()),
            vocab_size=vocab_size,
            eos_token_ids=generation.eos_token_ids,
            defaults=sampling_defaults(asdict(generation)),
        )
        self._metrics.build.labels(version("trtserve"), settings.engine, model.name).set(1)
        self._metrics.watch(lambda: self._cluster.sample(self._live))
        self._model_name = model.name
        serving = Serving(
            model=model,
            rules=RequestRules(
                (model.name,),
                vocab_size,
                settings.unknown_params,
                settings.max_logprobs,
                guides=self._cluster.supports_guided_decoding,
            ),
            tokenizer=tokenizer,
            template=self._chat_template(),
            mode=self._plan.mode,
            cluster=self._cluster,
            live=self._live,
            flusher=self._flusher,
            metrics=self._metrics,
            keys=ApiKeys(self._api_keys),
            limits=HttpLimits(
                int(settings.max_body_mib * 2**20), int(settings.max_buffered_kib * 1024), settings.request_timeout
            ),
            roles=RoleChanges(
                self._cluster,
                settings.mode,
                self._plan.mode.roles,
                settings.worker_drain_timeout,
                lambda: self._live.draining,
            ),
            phase=self._phase,
        )
        return Application(serving)

    def _chat_template(self) -> ChatTemplate:
        path = self._settings.chat_template
        if path is None:
            return load_chat_template(self._folder)
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"--chat-template {path} cannot be read: {error}") from error
        return ChatTemplate({"default": source}, special_tokens(self._folder.tokenizer_config()))

    # -------------------------------------------------------------- while it runs

    def _phase(self) -> str:
        return "; ".join(f"{client.worker_id}: {client.phase}" for client in self._pool)

    async def _announce(self) -> None:
        """Wait for the first readiness and say so."""
        await self._cluster.ready(set(self._plan.mode.roles))
        settle()
        say(self._banner())

    def _url(self) -> str:
        host, port = self._address
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def _banner(self) -> str:
        url = self._url()
        workers = ", ".join(client.worker_id for client in self._pool)
        body = (
            f'{{"model": "{self._model_name}", "stream": true, "temperature": 0, "max_tokens": 100, '
            '"messages": [{"role": "user", "content": "Name the capital of France."}]}'
        )
        return (
            f"\ntrtserve {version('trtserve')}: {self._model_name}, mode {self._settings.mode}, "
            f"engine {self._settings.engine}, router {self._settings.router}, workers {workers}\n"
            f"ready at {url} after {time.monotonic() - self._started_s:.1f} s\n\n"
            f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n  -d '{body}'\n"
        )

    async def _measure_loop_delay(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + 1.0
            await asyncio.sleep(1.0)
            self._metrics.loop_delay.set(max(0.0, loop.time() - due_s))

    # -------------------------------------------------------------- the end

    def _on_signal(self) -> None:
        self._stop_signals += 1
        self._stop.set()
        if self._stop_signals > 1:
            self._stop_now.set()

    async def _drain(self) -> ExitCode:
        """Take no more requests, finish the running ones, and cut off what outlasts the timeout or a second signal."""
        self._live.draining = True
        logger.info("shutting down: %d requests are running", len(self._live))
        idle = asyncio.ensure_future(self._live.idle())
        now = asyncio.ensure_future(self._stop_now.wait())
        await asyncio.wait({idle, now}, timeout=self._settings.shutdown_timeout, return_when=asyncio.FIRST_COMPLETED)
        now.cancel()
        if idle.done():
            return ExitCode.OK
        logger.warning("shutting down: %d requests are cut off", len(self._live))
        self._live.cancel_all(Overloaded("the server is shutting down", code="draining", retry_after_s=5.0))
        await asyncio.wait({idle}, timeout=_LAST_ANSWERS_S)
        idle.cancel()
        return ExitCode.CUT_OFF

    def _explain(self, errors: BaseExceptionGroup[BaseException]) -> ExitCode:
        """Say what ended the server, for people, and choose the exit code."""
        codes: dict[type[BaseException], ExitCode] = {
            WorkerStartFailed: ExitCode.WORKER,
            ModelError: ExitCode.MODEL,
            AddressError: ExitCode.ADDRESS,
        }
        expected, rest = errors.split(tuple(codes))
        leaves = _leaves(expected)
        for error in leaves:
            say_error(f"trtserve: {error}")
            for line in getattr(error, "lines", ()):
                say_error(f"  | {line}")
        if rest is not None:
            logger.error("the server failed", exc_info=rest)
            return ExitCode.DEFECT
        return next(code for kind, code in codes.items() if isinstance(leaves[0], kind))


def _num_threads() -> int:
    """For long texts. More than there are cores bring nothing, and each keeps 2 MiB of what the tokenizer needs."""
    return max(2, len(os.sched_getaffinity(0)))


def _decision_log(settings: Settings) -> DecisionLog | None:
    """Raises SettingsError where the file cannot be written."""
    path = settings.decision_log
    if path is None:
        return None
    try:
        return DecisionLog(path, settings.router)
    except OSError as error:
        raise SettingsError(f"--decision-log {path}: cannot be written: {error.strerror}") from error


def _leaves(errors: BaseExceptionGroup[BaseException] | None) -> list[BaseException]:
    if errors is None:
        return []
    return [
        leaf
        for error in errors.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]
