"""Each shipped profile's arguments make an `LLM`, and its prefill hands over to its decode."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import ExitStack

import pytest

from tests.models import EOS_TOKEN_ID
from trtserve.plugins.api import Role
from trtserve.plugins.engines.tensorrt_llm.emitted_names import profile_arguments

PROFILES: dict[str, dict[Role, object]] = {}
for each in profile_arguments():
    PROFILES.setdefault(each.name, {})[each.role] = each.arguments

PROMPT = list(range(10, 50))


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("name", PROFILES)
async def test_a_profile_generates(import_trtllm, model_folder, violations, monkeypatch, name, version):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_ARGUMENTS", version)
    trtllm = import_trtllm()
    from tensorrt_llm.llmapi.llm_utils import update_llm_args_with_extra_dict

    def sampling():
        return trtllm.SamplingParams(end_id=EOS_TOKEN_ID, max_tokens=8, ignore_eos=True)

    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_DEVICES", "64")
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_STEP_MS", "0")
    with ExitStack() as stack:
        llms = {}
        for role, arguments in PROFILES[name].items():
            merged = update_llm_args_with_extra_dict(copy.deepcopy(arguments.base), copy.deepcopy(arguments.extra))
            llms[role] = stack.enter_context(trtllm.LLM(**merged | {"model": str(model_folder)}))
        outputs = {role: (await llm.generate_async(PROMPT, sampling())).outputs[0] for role, llm in llms.items()}
        if Role.PREFILL in llms:
            params = trtllm.DisaggregatedParams(request_type="context_only")
            first = await llms[Role.PREFILL].generate_async(PROMPT, sampling(), disaggregated_params=params)
            params = dataclasses.replace(first.outputs[0].disaggregated_params, request_type="generation_only")
            moved = llms[Role.DECODE].generate_async(PROMPT, sampling(), disaggregated_params=params)
            outputs[Role.AGG] = (await moved).outputs[0]
    assert len({tuple(output.token_ids) for output in outputs.values()}) == 1
    assert violations() == []
