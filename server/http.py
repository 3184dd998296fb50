"""hypercorn: its configuration, the listening socket, and serving until told to stop."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from hypercorn.asyncio import serve, tcp_server
from hypercorn.config import Config

from trtserve.server import http1
from trtserve.server.idle import IdleTimers
from trtserve.settings.schema import Settings

logger = logging.getLogger(__name__)

_BACKLOG = 4096
_GRACE_S = 3.0
"""How long connections with something to send get at the end."""


class AddressError(Exception):
    """The HTTP address cannot be used; the text names it."""

    def __init__(self, host: str, port: int, error: OSError) -> None:
        super().__init__(f"cannot listen on {host}:{port}: {error.strerror}")


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, not yet listening, so that an address in use is found before anything is loaded.

    Raises AddressError.
    """
    try:
        return _bind(host, port)
    except OSError as error:
        raise AddressError(host, port, error) from error


def _bind(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


async def serve_http(app: Any, bound: socket.socket, settings: Settings, stop: asyncio.Event) -> None:
    """Serve until `stop` is set; then idle connections close and the others get three seconds. Takes the socket.

    Raises AddressError where another server, which was bound at the same time, listens already.
    """
    try:
        bound.listen(_BACKLOG)
    except OSError as error:
        raise AddressError(settings.host, settings.port, error) from error
    config = Config()
    config.bind = [f"fd://{bound.detach()}"]
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    if settings.log_level == "info":
        config.errorlog.setLevel(logging.WARNING)  # the banner tells the address
    config.backlog = _BACKLOG
    config.include_date_header = False
    config.include_server_header = False
    idle = IdleTimers(settings.keep_alive_timeout)
    # server/idle.py says why.
    tcp_server.AsyncioSingleTask = idle.new  # type: ignore[assignment, attr-defined]
    http1.install()
    config.keep_alive_max_requests = 2**31  # the default closes busy connections after 1000
    config.h11_max_incomplete_size = int(settings.max_header_kib * 1024)
    config.graceful_timeout = _GRACE_S
    asyncio.get_running_loop().set_exception_handler(_on_loop_error)
    await _until_stopped(asyncio.create_task(serve(app, config, shutdown_trigger=stop.wait)), stop, idle)


async def _until_stopped(serving: asyncio.Task[None], stop: asyncio.Event, idle: IdleTimers) -> None:
    """Wait for hypercorn's end, in vain where a client does not read what was written for it: hypercorn cancels such a
    connection but goes on to wait for its last bytes. The end of the loop cancels it once more."""
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        idle.close_all()
        await asyncio.wait({serving}, timeout=_GRACE_S + 0.5)
    finally:
        stopping.cancel()
        is_over = serving.done()
        if not is_over:
            serving.cancel()
            await asyncio.wait({serving}, timeout=_GRACE_S + 0.5)
    if is_over:
        serving.result()
    elif serving.done() and not serving.cancelled():
        logger.debug("hypercorn was cut off", exc_info=serving.exception())


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Connections that outlast the graceful timeout are cancelled, which Python 3.11's streams take for an error."""
    if not isinstance(context.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(context)
