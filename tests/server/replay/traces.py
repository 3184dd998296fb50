"""Synthetic traces, and the parts of a replay that tests put together."""

import json
import random
from array import array

from trtserve.plugins.api import EngineConfig, ModeConfig
from trtserve.plugins.manager import PluginManager
from trtserve.plugins.routing_api import PolicyConfig
from trtserve.server.replay.engine import ReplayedEngine
from trtserve.server.replay.run import ReplayOptions
from trtserve.server.replay.trace import TraceRequest

BLOCK = 16


def entry(number, arrival_ms, blocks, output_tokens=4, rest=3):
    """A prompt of these blocks and `rest` tokens more."""
    hash_ids = array("i", [*blocks, *([1_000_000 + number] if rest else [])])
    return TraceRequest(number, arrival_ms, len(blocks) * BLOCK + rest, output_tokens, hash_ids)


def conversations(count, seed=0, every_ms=40.0):
    """Requests of which every other one goes on where an earlier one stopped, at times that are often the same."""
    draw = random.Random(seed)
    prompts, new_ids, now_ms, trace = [[0]], iter(range(1, 1_000_000)), 0.0, []
    for number in range(count):
        prompt = [*draw.choice(prompts), *(next(new_ids) for _ in range(draw.randint(0, 12)))]
        prompts.append(prompt)
        trace.append(entry(number, now_ms, prompt, draw.randint(1, 60), draw.choice([0, 5])))
        now_ms += draw.choice([0.0, every_ms, 2 * every_ms])
    return trace


def engine(num_blocks=400, budget=128, **others):
    return ReplayedEngine.of(
        EngineConfig("", block_size=BLOCK, num_blocks=num_blocks, max_num_seqs=200, max_num_tokens=budget, **others)
    )


def options(policy="round_robin", workers=2, engine=engine, **others):
    """`policy`: a name, or a policy."""
    manager = PluginManager()
    made = manager.make_policy(policy, PolicyConfig()) if isinstance(policy, str) else policy
    mode = others.pop("mode", None) or manager.make_mode("agg", ModeConfig(workers, 1, 1))
    return ReplayOptions(mode, made, engine(), trace_block_size=BLOCK, **others)


def write_trace(path, trace):
    rows = (
        {
            "timestamp": request.arrival_ms,
            "input_length": request.input_tokens,
            "output_length": request.output_tokens,
            "hash_ids": list(request.hash_ids),
        }
        for request in trace
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
