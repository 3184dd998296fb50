"""hypercorn: its configuration, the listening socket, and serving until told to stop."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from hypercorn.asyncio import serve
from hypercorn.config import Config

from trtserve.settings.schema import Settings

_BACKLOG = 4096


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
    config.keep_alive_timeout = settings.keep_alive_timeout
    config.keep_alive_max_requests = 2**31  # the default closes busy connections after 1000
    config.h11_max_incomplete_size = int(settings.max_header_kib * 1024)
    config.graceful_timeout = 3.0
    await serve(app, config, shutdown_trigger=stop.wait)
