"""The parameter structs of libucp that the binding uses, as ctypes layouts, and the constants that go with them.

Source: ucp/api/ucp.h and ucp/api/ucp_def.h of UCX 1.13 to 1.22. UCX only ever appends fields, and reads none whose bit
is not set in the mask, so one layout serves all of these versions. `RequestParam` ends where the one of 1.21 does.
"""

from __future__ import annotations

from ctypes import CFUNCTYPE, Structure, c_char_p, c_int, c_int8, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from typing import ClassVar

API_MAJOR, API_MINOR = 1, 13
"""The oldest interface asked for: the first one whose `ucp_get_nbx` takes a memory handle."""

FEATURE_RMA = 1 << 1
FEATURE_WAKEUP = 1 << 4
THREAD_MODE_SERIALIZED = 1

PARAMS_FEATURES = 1 << 0
WORKER_THREAD_MODE = 1 << 0
MEM_ADDRESS = 1 << 0
MEM_LENGTH = 1 << 1
MEM_FLAGS = 1 << 2
MEM_TYPE = 1 << 4
MEM_FLAG_ALLOCATE = 1 << 1
MEM_ATTR_ADDRESS = 1 << 0
EP_REMOTE_ADDRESS = 1 << 0
EP_ERR_MODE = 1 << 1
EP_ERR_HANDLER = 1 << 2
EP_ERR_MODE_PEER = 1
EP_ATTR_TRANSPORTS = 1 << 3
OP_FLAGS = 1 << 4
OP_MEMORY_TYPE = 1 << 6
OP_MEMH = 1 << 8
CLOSE_FORCE = 1 << 0

MEMORY_TYPE_HOST = 0
MEMORY_TYPE_CUDA = 1

OK = 0
IN_PROGRESS = 1
ERR_NO_RESOURCE = -2
ERR_NO_MEMORY = -4
ERR_INVALID_PARAM = -5
ERR_UNSUPPORTED = -22
ERR_LAST = -100

Status = c_int8
"""`ucs_status_t` is a packed enum: one signed byte, whose register has garbage above it."""

ErrorCallback = CFUNCTYPE(None, c_void_p, c_void_p, Status)


class Params(Structure):
    """`ucp_params_t`."""

    _fields_: ClassVar = [
        ("field_mask", c_uint64),
        ("features", c_uint64),
        ("request_size", c_size_t),
        ("request_init", c_void_p),
        ("request_cleanup", c_void_p),
        ("tag_sender_mask", c_uint64),
        ("mt_workers_shared", c_int),
        ("estimated_num_eps", c_size_t),
        ("estimated_num_ppn", c_size_t),
        ("name", c_char_p),
        ("node_local_id", c_size_t),
    ]


class WorkerParams(Structure):
    """`ucp_worker_params_t`."""

    _fields_: ClassVar = [
        ("field_mask", c_uint64),
        ("thread_mode", c_int),
        ("cpu_mask", c_uint64 * 16),
        ("events", c_uint),
        ("user_data", c_void_p),
        ("event_fd", c_int),
        ("flags", c_uint64),
        ("name", c_char_p),
        ("am_alignment", c_size_t),
        ("client_id", c_uint64),
    ]


class MemMapParams(Structure):
    """`ucp_mem_map_params_t`."""

    _fields_: ClassVar = [
        ("field_mask", c_uint64),
        ("address", c_void_p),
        ("length", c_size_t),
        ("flags", c_uint),
        ("prot", c_uint),
        ("memory_type", c_int),
        ("exported_memh_buffer", c_void_p),
    ]


class MemAttr(Structure):
    """`ucp_mem_attr_t`."""

    _fields_: ClassVar = [
        ("field_mask", c_uint64),
        ("address", c_void_p),
        ("length", c_size_t),
        ("mem_type", c_int),
    ]


class ErrorHandler(Structure):
    """`ucp_err_handler_t`."""

    _fields_: ClassVar = [("cb", ErrorCallback), ("arg", c_void_p)]


class SockAddr(Structure):
    """`ucs_sock_addr_t`."""

    _fields_: ClassVar = [("addr", c_void_p), ("addrlen", c_uint32)]


class EpParams(Structure):
    """`ucp_ep_params_t`."""

    _fields_: ClassVar = [
        ("field_mask", c_uint64),
        ("address", c_void_p),
        ("err_mode", c_int),
        ("err_handler", ErrorHandler),
        ("user_data", c_void_p),
        ("flags", c_uint),
        ("sockaddr", SockAddr),
        ("conn_request", c_void_p),
        ("name", c_char_p),
        ("local_sockaddr", SockAddr),
    ]


class TransportEntry(Structure):
    """`ucp_transport_entry_t`."""

    _fields_: ClassVar = [("transport_name", c_char_p), ("device_name", c_char_p)]


class Transports(Structure):
    """`ucp_transports_t`."""

    _fields_: ClassVar = [("entries", c_void_p), ("num_entries", c_uint), ("entry_size", c_size_t)]


class EpAttr(Structure):
    """`ucp_ep_attr_t`."""

    _fields_: ClassVar = [
        ("field_mask", c_uint64),
        ("name", c_int8 * 32),
        ("local_sockaddr", c_uint64 * 16),
        ("remote_sockaddr", c_uint64 * 16),
        ("transports", Transports),
        ("user_data", c_void_p),
    ]


class RequestParam(Structure):
    """`ucp_request_param_t`."""

    _fields_: ClassVar = [
        ("op_attr_mask", c_uint32),
        ("flags", c_uint32),
        ("request", c_void_p),
        ("cb", c_void_p),
        ("datatype", c_uint64),
        ("user_data", c_void_p),
        ("reply_buffer", c_void_p),
        ("memory_type", c_int),
        ("recv_info", c_void_p),
        ("memh", c_void_p),
    ]
