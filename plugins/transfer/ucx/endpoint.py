"""A connection to one peer's worker: its remote keys, its gets' requests, and its end."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_void_p

from trtserve.plugins.transfer.ucx import structs
from trtserve.plugins.transfer.ucx.libucp import request_status
from trtserve.plugins.transfer.ucx.worker import UcxWorker

_MAX_TRANSPORTS = 16
_HELPING_TRANSPORTS = frozenset({"tcp", "self", "cuda_copy"})  # beside these, another one carries the blocks


class ErrorLog:
    """What UCX's error callback said, by the endpoint's key. Outlives the worker.

    The callback only records: an exception raised in it would be lost in C.
    """

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.callback = structs.ErrorCallback(self._record)

    def _record(self, key: int | None, _endpoint: int | None, status: int) -> None:
        self.statuses[key or 0] = status


class Endpoint:
    """Connects in the background once made, in UCX's peer error mode: a lost peer is an error, not an abort.

    An endpoint that failed must be closed too. Closing is always by force. Measured with UCX 1.22: over TCP it ends
    the gets under way with UCS_ERR_CANCELED at the next progress; over CMA they run on to their end, needing nothing of
    the peer. So a closed endpoint says nothing of its gets; each one's request does, and `free` is for when none is
    left. Over TCP a forced close also resets the connection that the peer may use to read from here, and while both
    processes live, UCX keeps two descriptors of it on each side.

    What no code here can help (1.22): over TCP, a process that answers gets aborts ("Fatal: unexpected error: Endpoint
    timeout") if the reader's socket is reset while an answer is being sent. A reader that dies amid a read may so take
    the worker that it read from with it. CMA has no such answers.

    Every method but `close` and `free` raises UcxError where UCX refuses.
    """

    def __init__(self, worker: UcxWorker, address: bytes, key: int, errors: ErrorLog) -> None:
        """key: for `errors`, above zero and never used again."""
        self._library = worker.library
        self._rkeys: list[int] = []
        self._closing: int | None = None  # the request
        self._is_closed = False
        remote = ctypes.create_string_buffer(address, len(address))
        params = structs.EpParams(
            field_mask=structs.EP_REMOTE_ADDRESS | structs.EP_ERR_MODE | structs.EP_ERR_HANDLER,
            address=ctypes.addressof(remote),
            err_mode=structs.EP_ERR_MODE_PEER,
            err_handler=structs.ErrorHandler(errors.callback, key),
        )
        endpoint = c_void_p()
        self._library.check("ucp_ep_create", self._library.ucp_ep_create(worker.handle, byref(params), byref(endpoint)))
        assert endpoint.value is not None
        self.handle = endpoint.value

    def unpack_rkey(self, packed: bytes) -> int:
        """The `ucp_rkey_h` of a region at the peer, valid until `free`."""
        rkey = c_void_p()
        self._library.check("ucp_ep_rkey_unpack", self._library.ucp_ep_rkey_unpack(self.handle, packed, byref(rkey)))
        assert rkey.value is not None
        self._rkeys.append(rkey.value)
        return rkey.value

    def lane(self) -> str:
        """The transports that carry the blocks, such as ``cma`` or ``tcp``; ``ucx`` where this version cannot say."""
        entries = (structs.TransportEntry * _MAX_TRANSPORTS)()
        transports = structs.Transports(
            ctypes.addressof(entries), _MAX_TRANSPORTS, ctypes.sizeof(structs.TransportEntry)
        )
        attributes = structs.EpAttr(field_mask=structs.EP_ATTR_TRANSPORTS, transports=transports)
        self._library.check("ucp_ep_query", self._library.ucp_ep_query(self.handle, byref(attributes)))
        names = {entry.transport_name.decode() for entry in entries if entry.transport_name}
        return "+".join(sorted(names - _HELPING_TRANSPORTS or names)) or "ucx"

    def close(self) -> None:
        """Begin to close; idempotent. The endpoint posts nothing from here on."""
        if self._is_closed or self._closing is not None:
            return
        param = structs.RequestParam(op_attr_mask=structs.OP_FLAGS, flags=structs.CLOSE_FORCE)
        request = self._library.ucp_ep_close_nbx(self.handle, byref(param))
        if request_status(request) == structs.IN_PROGRESS:
            self._closing = request
        else:  # closed at once, or with an error, which gives everything back as well
            self._is_closed = True

    def is_closed(self) -> bool:
        """Whether `close` has come to its end."""
        closing = self._closing
        if closing is not None and self._library.ucp_request_check_status(closing) != structs.IN_PROGRESS:
            self._library.ucp_request_free(closing)
            self._closing, self._is_closed = None, True
        return self._is_closed

    def free(self) -> None:
        """Give the remote keys back; only once no get is left."""
        for rkey in self._rkeys:
            self._library.ucp_rkey_destroy(rkey)
        self._rkeys.clear()
