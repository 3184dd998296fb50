"""`tensorrt_llm.llmapi.llm_utils`: where trtllm-serve imports the merging from."""

from .llm_args import update_llm_args_with_extra_dict, update_llm_args_with_extra_options

__all__ = ["update_llm_args_with_extra_dict", "update_llm_args_with_extra_options"]
