"""Whatever a user's file holds, it becomes arguments or one clear error."""

from __future__ import annotations

import copy

from hypothesis import given, settings
from hypothesis import strategies as st

from trtserve.plugins.api import EngineConfig, Role
from trtserve.plugins.engines.tensorrt_llm import fields
from trtserve.plugins.engines.tensorrt_llm.arguments import ArgumentsError, llm_arguments
from trtserve.plugins.engines.tensorrt_llm.options import TensorRTLLMOptions
from trtserve.plugins.engines.tensorrt_llm.rules import check_roles

OLD = ["pytorch_backend_config", "use_cuda_graph", "cuda_graph_batch_sizes", "kv_cache_dtype", "moe_backend", "tp_size"]
INNER = sorted({name for names in (*fields.NESTED.values(), *fields.SPECULATIVE.values()) for name in names})

scalars = (
    st.none() | st.booleans() | st.integers(-2, 10**6) | st.sampled_from(["fp8", "MTP", "NIXL", "x"]) | st.floats(0, 1)
)
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.sampled_from(INNER), scalars | st.lists(scalars))
user_files = st.dictionaries(st.sampled_from(sorted({*fields.LLM, *OLD, "zzz"})), values, max_size=6)


def made(role, llm_args):
    config = EngineConfig("/m", role, block_size=32, max_seq_len=4096)
    return llm_arguments(config, TensorRTLLMOptions(llm_args=llm_args))


@settings(max_examples=300, deadline=None)
@given(user_files, st.sampled_from(Role))
def test_a_users_file_becomes_arguments_or_an_error(llm_args, role):
    before = copy.deepcopy(llm_args)
    try:
        arguments = made(role, llm_args)
    except ArgumentsError as error:
        assert str(error).strip()
        return
    finally:
        assert repr(llm_args) == repr(before)
    assert "zzz" not in arguments.extra
    assert arguments.extra.keys() <= fields.LLM | fields.LATER
    together = arguments.merged()
    assert {**arguments.base, **arguments.extra}.keys() == together.keys()
    assert isinstance(check_roles({Role.PREFILL: together, Role.DECODE: together}), list)
