"""A stand-in for TensorRT-LLM's Python interface: names, rules and traps of 1.2.1 as they are documented, no model.

It generates tokens that only the prompt decides, moves no KV but proves that the right prompt's would have been moved,
and raises wherever a caller breaks a rule. `stand_in/environment.py` lists what a test may change.
"""

from .stand_in.environment import variable

__version__ = variable("VERSION", "1.2.1")

from .disaggregated_params import DisaggregatedParams
from .llmapi import LLM, RequestOutput
from .sampling_params import GuidedDecodingParams, SamplingParams
from .scheduling_params import SchedulingParams

__all__ = ["LLM", "DisaggregatedParams", "GuidedDecodingParams", "RequestOutput", "SamplingParams", "SchedulingParams"]
