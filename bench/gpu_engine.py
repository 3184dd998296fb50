"""The torch engine on one GPU: tokens a second, and how far that is from what the memory's speed allows.

    python bench/gpu_engine.py [--layers 16] [--width 2048]

A Llama of random weights in bfloat16, 256 tokens of context. The roofline of a decode step is the time to read weights
and KV once, at the speed of a device copy in the same run (read and write both count).
"""

from __future__ import annotations

import argparse
import time
from array import array
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trtserve.plugins.api import EngineConfig, Request, RequestId, SamplingParams
from trtserve.plugins.engines.torch.engine import TorchEngine
from trtserve.plugins.engines.torch.model import prepare_model
from trtserve.plugins.engines.torch.options import TorchOptions

CONTEXT, STEPS = 256, 64
DEVICE = torch.device("cuda")


def copy_bytes_per_s() -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        begun_s = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun_s)
    return 2 * source.nbytes / median(times)


def decode_step_s(engine: TorchEngine, batch: int, first_id: int) -> float:
    generator = torch.Generator().manual_seed(first_id)
    for number in range(batch):
        prompt = array("i", torch.randint(3, 30_000, (CONTEXT,), generator=generator).tolist())
        params = SamplingParams(STEPS, temperature=0.0)
        engine.add(Request(RequestId(first_id + number), prompt, params))
    times = []
    while engine.has_work():
        stats = engine.step().stats
        if stats is not None and stats.decode_sequences == batch and not stats.prefill_tokens:
            times.append(stats.duration_s)
    return median(times)


def prefill_s(engine: TorchEngine, num_tokens: int, request_id: int) -> float:
    generator = torch.Generator().manual_seed(request_id)
    prompt = array("i", torch.randint(3, 30_000, (num_tokens,), generator=generator).tolist())
    engine.add(Request(RequestId(request_id), prompt, SamplingParams(1, temperature=0.0)))
    begun_s = time.perf_counter()
    while engine.has_work():
        engine.step()
    return time.perf_counter() - begun_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    arguments = parser.parse_args()
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=arguments.width,
        intermediate_size=4 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    module = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    weight_bytes = sum(weight.nbytes for weight in module.parameters())
    model = prepare_model(module, torch.bfloat16, DEVICE, TorchOptions())
    kv_bytes_per_token = 2 * sum(layer.width for layer in model.layers)
    wanted = EngineConfig("in memory", dtype="bfloat16", device="cuda", num_blocks=4096, max_num_tokens=8192)
    engine = TorchEngine(wanted, load=lambda *_: model)
    engine.start(lambda phase: None)
    speed = copy_bytes_per_s()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {weight_bytes / 1e9:.2f} GB of weights")
    print(f"copy {speed / 1e12:.2f} TB/s, read and write\n\n| | tokens/s | ms | of the roofline |\n|---|---|---|---|")
    decode_step_s(engine, 2, 1)  # warm
    for batch in (1, 8, 64):
        step_s = decode_step_s(engine, batch, 1000 * batch)
        limit_s = (weight_bytes + batch * (CONTEXT + STEPS // 2) * kv_bytes_per_token) / speed
        print(
            f"| decode, batch {batch} | {batch / step_s:,.0f} | {step_s * 1e3:.2f} | {limit_s / step_s:.2f} |",
            flush=True,
        )
    for num_tokens in (512, 4000):
        prefill_s(engine, num_tokens, 200_000 + num_tokens)
        took_s = min(prefill_s(engine, num_tokens, 300_000 + number) for number in range(3))
        print(f"| prefill of {num_tokens} | {num_tokens / took_s:,.0f} | {took_s * 1e3:.1f} | |", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
