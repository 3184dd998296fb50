"""A worker with the simulated engine that hands KV on; also the program of one in a process of its own.

python -m tests.server.workers.kv_worker '[[endpoint, folder, worker id, incarnation], {"option": value}]'
"""

import json
import sys
from importlib.metadata import version

from trtserve.plugins.api import EngineConfig, Role, WorkerId
from trtserve.plugins.engines.sim import make_engine
from trtserve.plugins.transfer.shm.transfer import ShmTransfer
from trtserve.plugins.transfer_api import TransferConfig
from trtserve.server.workers import wire, worker
from trtserve.server.workers.kv_exchange import ExchangeOptions
from trtserve.server.workers.kv_memory import TransferChoice

BLOCK_SIZE = 8
NUM_ROWS = 64
ENGINE_OPTIONS = {"speedup": 1e9, "vocab_size": 1000}


def make_worker(endpoint, runtime_dir, worker_id, incarnation, **changes):
    """A worker that is not running. changes: options of the engine, fields of EngineConfig and ExchangeOptions; with
    num_rows=0 it takes no part in the hand-over."""
    options = {name: changes.pop(name) for name in ("kv_block_bytes",) if name in changes}
    exchange = {"num_rows": NUM_ROWS}
    exchange |= {name: changes.pop(name) for name in ("num_rows", "lease_s", "clock", "choice") if name in changes}
    exchange.setdefault("choice", TransferChoice({"shm": ShmTransfer}, is_required=True))
    limits = {"block_size": BLOCK_SIZE, "num_blocks": 600, "max_num_seqs": 16, "max_num_tokens": 4096} | changes
    role = Role(worker_id.partition("-")[0])
    config = EngineConfig("", role, options=ENGINE_OPTIONS | options, **limits)
    kv = ExchangeOptions(config=TransferConfig(WorkerId(worker_id), incarnation, str(runtime_dir)), **exchange)
    identity = worker.WorkerIdentity(_hello(WorkerId(worker_id), incarnation, role), endpoint, 10.0)
    return worker.Worker(identity, lambda: make_engine("sim", config), 0.0, kv if exchange["num_rows"] else None)


def _hello(worker_id, incarnation, role):
    model, tokenizer, ours = "model", "tokenizer", version("trtserve")
    return wire.Hello(wire.WIRE_VERSION, worker_id, incarnation, "token", 1, role, "sim", model, tokenizer, ours)


if __name__ == "__main__":
    worker._HEARTBEAT_S = 0.03  # tests wait for what heartbeats say
    given, given_changes = json.loads(sys.argv[1])
    sys.exit(make_worker(*given, **given_changes).run())
