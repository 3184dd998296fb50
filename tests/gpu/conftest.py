"""A CUDA device, or none: without one the tests here are skipped; where one is promised they fail."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.models import EOS_TOKEN_ID, MAX_SEQ_LEN, VOCAB_SIZE, make_tiny_model
from trtserve.plugins.transfer import cuda_driver
from trtserve.plugins.transfer_api import TransferError


@pytest.fixture(scope="session")
def device() -> str:
    try:
        cuda_driver.device_uuid("cuda:0")
    except TransferError as error:
        assert not os.environ.get("TRTSERVE_TEST_EXPECT_GPU"), f"a GPU was promised: {error}"
        pytest.skip(f"no GPU: {error}")
    return "cuda:0"


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of random weights in float32, with the tests' tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "llama")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_SEQ_LEN,
        eos_token_id=EOS_TOKEN_ID,
        initializer_range=0.08,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
