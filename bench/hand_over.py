"""What handing KV over adds to a request, as a share of its time to the first token: a disaggregated server beside an
aggregated one, the same prompts in turn.

    python bench/hand_over.py [--prompt-tokens 300,2000] [--transfer shm] [--requests 15] [--random 16x2048] [FLAG ...]

One request at a time. "waits": from the end of the prompt until the decode worker has its KV. "copies": of the engines'
threads between cache and rows; of prompts of several passes most happen, like most reads, before the first token. The
share is waits and copies over the time to the first token. "second token" has more in it: the decode worker computes
what is left of the prompt's last block, with cold caches. FLAGs are trtserve's (`--dtype float32`, `--device cuda`).
`--random`: a Llama of random weights, layers x width.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent))
TRTSERVE = Path(sys.executable).with_name("trtserve")
START_S = 180.0


@contextmanager
def server(model: str, flags: list[str]) -> Iterator[httpx.Client]:
    """A server that is ready; ended with the block."""
    command = [str(TRTSERVE), "serve", model, "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        url = ""
        for line in process.stdout:
            found = re.search(r"http://[\d.]+:\d+", line)
            url = found[0] if found else url
            if "curl -N" in line:
                break
        with httpx.Client(base_url=url, trust_env=False, timeout=120) as client:
            until_s = time.monotonic() + START_S
            while client.get("/ready").status_code != 200:
                assert time.monotonic() < until_s, "not ready"
                time.sleep(0.1)
            yield client
    finally:
        process.terminate()
        process.communicate(timeout=60)


def token_times(client: httpx.Client, prompt: list[int]) -> tuple[float, float]:
    """Seconds to the first and to the second token."""
    body = {"prompt": prompt, "max_tokens": 3, "temperature": 0, "ignore_eos": True, "stream": True}
    times = []
    begun_s = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                times.append(time.perf_counter() - begun_s)
    return times[0], times[1]


def totals(client: httpx.Client) -> dict[str, float]:
    """Seconds and bytes of all hand-overs so far; workers tell of their copies once a second."""
    time.sleep(1.2)
    text = client.get("/metrics").text
    workers = client.get("/v1/workers").json()["workers"]
    return {
        "waits": _total(text, "trtserve_kv_hand_over_duration_seconds_sum"),
        "reads": _total(text, "trtserve_kv_fetch_duration_seconds_sum"),
        "copies": sum(worker["kv"]["usage"]["copying_us_total"] for worker in workers) / 1e6,
        "bytes": _total(text, "trtserve_kv_fetched_bytes_total"),
    }


def _total(text: str, name: str) -> float:
    return sum(map(float, re.findall(rf"^{name}(?:\{{.*\}})? ([\d.e+-]+)$", text, re.MULTILINE)))


def random_model(shape: str) -> str:
    """A folder with a Llama of random weights and the tests' tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.models import MAX_SEQ_LEN, VOCAB_SIZE, make_tiny_model

    layers, width = map(int, shape.split("x"))
    folder = make_tiny_model(Path(tempfile.mkdtemp()) / "random")
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=8,
        max_position_embeddings=MAX_SEQ_LEN,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", default="300,2000")
    parser.add_argument("--transfer", default="auto")
    parser.add_argument("--requests", type=int, default=15)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--random", default="")
    arguments, flags = parser.parse_known_args()
    model = random_model(arguments.random) if arguments.random else arguments.model
    disagg = ["--mode", "disagg", "--disagg-policy", "always", "--transfer", arguments.transfer, *flags]
    print("| prompt | first token, agg | disagg | second, agg | disagg | reads | waits | copies | MB | share of TTFT |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with server(model, flags) as one, server(model, disagg) as two:
        for num_tokens in map(int, arguments.prompt_tokens.split(",")):
            chance = random.Random(num_tokens)
            times: dict[str, list[tuple[float, float]]] = {"agg": [], "disagg": []}
            before = totals(two)
            for _ in range(arguments.requests + 1):
                prompt = [chance.randrange(300, 900) for _ in range(num_tokens)]
                times["agg"].append(token_times(one, prompt))
                times["disagg"].append(token_times(two, prompt))
            after = totals(two)
            (a1, a2), (d1, d2) = ([median(column) for column in zip(*rows[1:], strict=True)] for rows in times.values())
            each = {name: (after[name] - before[name]) / (arguments.requests + 1) for name in after}
            share = (each["waits"] + each["copies"]) / d1
            shown = (a1, d1, a2, d2, each["reads"], each["waits"], each["copies"])
            cells = [f"{value * 1e3:.2f} ms" for value in shown]
            print(f"| {num_tokens} | {' | '.join(cells)} | {each['bytes'] / 1e6:.1f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
