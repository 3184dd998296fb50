"""Hypothesis strategies for everything that crosses the wire."""

from array import array

from hypothesis import strategies as st
from msgspec.structs import replace

from trtserve.plugins.api import (
    BlockHash,
    EngineInfo,
    FinishReason,
    GuidedDecoding,
    KVCleared,
    KVHandle,
    KVRemoved,
    KVStored,
    Output,
    PassStats,
    Request,
    RequestId,
    Role,
    SamplingParams,
    StepOutputs,
    StoredBlock,
    TokenLogprob,
    WorkerId,
    WorkerLoad,
)
from trtserve.plugins.transfer_api import PeerInfo
from trtserve.server.workers import kv_messages as kv
from trtserve.server.workers import wire

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
UINT64 = st.integers(0, 2**64 - 1)
COUNT = st.integers(0, 2**40)
FLOAT = st.floats(allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAME = TEXT.map(WorkerId)
REQUEST_ID = st.integers(0, 2**63 - 1).map(RequestId)
HASH = UINT64.map(BlockHash)
TOKENS = st.lists(INT32, min_size=1, max_size=6)


LOAD = st.builds(WorkerLoad, **{name: COUNT for name in WorkerLoad.__struct_fields__})
INFO = st.builds(
    EngineInfo,
    *[COUNT] * 6,
    publishes_kv_events=st.booleans(),
    max_logprobs=COUNT,
    moves_kv=st.booleans(),
    kv_fingerprint=TEXT,
)
STATS = st.builds(PassStats, FLOAT, COUNT, COUNT, COUNT)
LOGPROB = st.builds(TokenLogprob, INT32, FLOAT, st.lists(st.tuples(INT32, FLOAT), max_size=3).map(tuple))
HANDLE = st.builds(
    KVHandle,
    st.integers(0, 2**63 - 1),
    NAME,
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**31 - 1),
    st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple),
    st.booleans(),
    st.binary(max_size=9),
)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 10**6),
    temperature=FLOAT,
    seed=st.none() | INT64,
    logit_bias=st.lists(st.tuples(INT32, FLOAT), max_size=3).map(tuple),
    stop_token_ids=st.lists(INT32, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    guided=st.none() | st.builds(GuidedDecoding, st.sampled_from(["json_object", "json_schema", "regex"]), TEXT),
)
REQUEST = st.builds(
    Request,
    REQUEST_ID,
    TOKENS.map(lambda ids: array("i", ids)),
    SAMPLING,
    st.lists(INT32, max_size=3).map(tuple),
    cache_salt=TEXT,
    keeps_kv=st.booleans(),
    kv_handle=st.none() | HANDLE,
    rank=st.none() | st.integers(0, 63),
).map(lambda request: replace(request, num_resumed=len(request.prompt) // 2))
BLOCK = st.builds(StoredBlock, HASH, TOKENS.map(lambda ids: array("i", ids)))
EVENT = st.one_of(
    st.builds(KVStored, st.none() | HASH, st.lists(BLOCK, max_size=3).map(tuple)),
    st.builds(KVRemoved, st.lists(HASH, max_size=3).map(tuple)),
    st.just(KVCleared()),
)
OUTPUT = st.builds(
    Output,
    REQUEST_ID,
    st.lists(INT32, max_size=4),
    st.none() | st.sampled_from(FinishReason),
    st.none() | INT32,
    st.none() | COUNT,
    st.none() | st.lists(LOGPROB, max_size=2).map(tuple),
    st.none() | TEXT,
    st.none() | HANDLE,
    kv_lost=st.booleans(),
    is_refused=st.booleans(),
    speculation=st.none() | st.tuples(COUNT, COUNT),
)
STEP = st.builds(
    StepOutputs,
    st.lists(OUTPUT, max_size=5, unique_by=lambda output: output.request_id),
    LOAD,
    st.lists(EVENT, max_size=3),
    st.none() | STATS,
    rank=st.integers(0, 63),
)
HELLO = st.builds(
    wire.Hello, COUNT, NAME, st.integers(0, 2**63 - 1), TEXT, COUNT, st.sampled_from(Role), TEXT, TEXT, TEXT, TEXT
)
SMALL_COUNT = st.integers(0, 2**31 - 1)
ID = st.integers(0, 2**63 - 1)
SECONDS = st.floats(min_value=0, allow_nan=False)
ROWS = st.lists(SMALL_COUNT, max_size=5).map(kv.pack_rows)
PEER = st.builds(PeerInfo, NAME, ID, TEXT, TEXT, COUNT, COUNT, TEXT, TEXT, TEXT)
EXPORTS = st.lists(st.tuples(st.sampled_from(["shm", "ucx"]), st.binary(max_size=9)), max_size=2).map(tuple)
PORT = st.builds(kv.KVPort, TEXT, st.integers(1, 2**40), st.integers(1, 2**22), PEER, EXPORTS)
USAGE = st.builds(kv.KVUsage, **dict.fromkeys(kv.KVUsage.__struct_fields__, SMALL_COUNT))
FROM_WORKER = st.one_of(
    HELLO,
    st.builds(wire.Progress, TEXT),
    st.builds(wire.Ready, INFO, st.none() | PORT),
    st.builds(wire.Heartbeat, COUNT, LOAD, st.none() | USAGE),
    st.builds(wire.step_of, COUNT, COUNT, STEP),
    st.builds(wire.blocks_of, COUNT, st.sets(HASH, max_size=5)),
    st.builds(kv.KVPublished, REQUEST_ID, ID, SMALL_COUNT, ROWS, st.booleans()),
    st.builds(kv.KVReleased, ID, st.booleans()),
    st.builds(kv.KVFetched, REQUEST_ID, st.booleans(), SMALL_COUNT, COUNT, SECONDS, TEXT, TEXT),
    st.builds(kv.KVLinked, NAME, ID, TEXT, TEXT, SECONDS, TEXT),
    st.builds(wire.Failed, TEXT),
)
TO_WORKER = st.one_of(
    st.just(wire.Welcome()),
    st.builds(wire.Refused, TEXT),
    st.builds(lambda request, keep_kv: wire.submit_of(request, keep_kv=keep_kv), REQUEST, st.booleans()),
    st.builds(wire.Cancel, REQUEST_ID),
    st.builds(kv.KVPeer, NAME, ID, TEXT, PEER, EXPORTS),
    st.builds(kv.KVPeerGone, NAME, ID),
    st.builds(
        lambda request, handle, is_first: kv.fetch_of(request, handle, is_first=is_first),
        REQUEST,
        HANDLE,
        st.booleans(),
    ),
    st.builds(kv.KVCommit, REQUEST_ID, st.booleans()),
    st.builds(kv.KVAbort, REQUEST_ID),
    st.builds(kv.KVExtend, st.lists(ID, max_size=3).map(tuple)),
    st.builds(kv.KVRelease, ID),
    st.just(wire.Resync()),
    st.just(wire.Shutdown()),
)
