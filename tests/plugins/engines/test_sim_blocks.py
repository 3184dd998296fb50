"""Whatever happens, every block is in exactly one place, and all come back."""

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from trtserve.plugins.api import KVRemoved, KVStored, Request, RequestId, SamplingParams
from trtserve.plugins.engines.sim.limits import SchedulerLimits
from trtserve.plugins.engines.sim.scheduler import Scheduler
from trtserve.plugins.engines.sim.speculation import Speculation
from trtserve.plugins.engines.sim.timing import PassTiming
from trtserve.plugins.engines.sim.tokens import TokenModel

BLOCK, NUM_BLOCKS = 4, 10
MAX_SEQ_LEN = BLOCK * NUM_BLOCKS

ADD = st.tuples(
    st.just("add"),
    st.integers(1, MAX_SEQ_LEN - 1),  # prompt tokens
    st.integers(1, MAX_SEQ_LEN),  # max_tokens
    st.integers(0, 2),  # which of three prompt families
)
STEP = st.tuples(st.just("step"))
ABORT = st.tuples(st.just("abort"), st.integers(0, 20))
ACTIONS = st.lists(ADD | STEP | STEP | ABORT, max_size=60)


class Model:
    """What the events say is stored."""

    def __init__(self):
        self.stored = set()
        self.ever_stored = set()

    def apply(self, events):
        for event in events:
            match event:
                case KVStored(parent, blocks):
                    assert parent is None or parent in self.ever_stored
                    for block in blocks:
                        assert block.hash not in self.stored
                        assert len(block.token_ids) == BLOCK
                        self.stored.add(block.hash)
                        self.ever_stored.add(block.hash)
                case KVRemoved(hashes):
                    assert self.stored.issuperset(hashes)
                    self.stored -= set(hashes)


def check_blocks(engine: Scheduler) -> None:
    held = {block for sequence in engine.running for block in sequence.blocks}
    references = sum(len(sequence.blocks) for sequence in engine.running)
    assert all(not sequence.blocks for sequence in engine.waiting)
    assert sum(block.references for block in held) == references
    assert len(held) + engine.pool.num_evictable + engine.pool.num_unused == NUM_BLOCKS
    assert engine.load().free_blocks == NUM_BLOCKS - len(held)
    for sequence in engine.running:
        assert len(sequence.blocks) == -(-sequence.num_computed // BLOCK)


@settings(max_examples=150, deadline=None)
@given(actions=ACTIONS, budget=st.sampled_from([3, 16, 64]), caching=st.booleans(), drafts=st.sampled_from([0, 3]))
def test_blocks_are_never_lost_nor_given_twice(actions, budget, caching, drafts):
    limits = SchedulerLimits(BLOCK, NUM_BLOCKS, 4, budget, MAX_SEQ_LEN, caching)
    speculation = Speculation(drafts, 0.5) if drafts else None
    engine = Scheduler(limits, PassTiming(), TokenModel(100, 400), speculation)
    model, finals, wanted, num_tokens = Model(), [], {}, {}

    def step():
        result = engine.run_pass()
        model.apply(result.events)
        assert len(model.stored) == engine.pool.num_stored <= NUM_BLOCKS
        for output in result.outputs:
            assert output.request_id not in finals
            num_tokens[output.request_id] = num_tokens.get(output.request_id, 0) + len(output.token_ids)
            if output.finish_reason is not None:
                finals.append(output.request_id)
                if output.finish_reason == "length":
                    assert num_tokens[output.request_id] == wanted[output.request_id]
        check_blocks(engine)

    for action in actions:
        match action:
            case ("add", length, max_tokens, family):
                number = RequestId(len(wanted))
                prompt = array("i", [family] * length)
                engine.add(Request(number, prompt, SamplingParams(max_tokens=max_tokens)))
                wanted[number] = min(max_tokens, MAX_SEQ_LEN - length)
            case ("abort", number):
                engine.abort(RequestId(number))
                check_blocks(engine)
            case ("step",):
                step()
    for _ in range(20_000):
        if not engine.has_work():
            break
        step()
    assert sorted(finals) == sorted(wanted)
    assert engine.load().free_blocks == NUM_BLOCKS
    assert (engine.load().running, engine.load().waiting) == (0, 0)
