"""What KV-aware routing gains: multi-turn chats that share system prompts, through HTTP.

    python bench/chats.py [--conversations 12] [--turns 3]

Starts real servers. First two torch workers with the default model in float32, once with round robin and once with kv:
cached tokens and time to first token from the server's own metrics, and whether the answers are the same. Then eight
simulated workers under load: what a decision costs. Exits 1 where kv does not gain, an answer differs, or the 99th
percentile of decisions is not below a millisecond.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

TRTSERVE = Path(sys.executable).with_name("trtserve")
PORT = 8391
TOPICS = (
    "the sea",
    "old maps",
    "bread",
    "winter",
    "clocks",
    "bees",
    "bridges",
    "salt",
    "trains",
    "glass",
    "tea",
    "wool",
)
SYSTEMS = tuple(
    f"You are assistant number {number}. " + "Answer in one short and friendly sentence, and never use lists. " * 12
    for number in range(4)
)


@contextmanager
def server(*flags: str) -> Iterator[str]:
    """A server's URL, once it is ready."""
    url = f"http://127.0.0.1:{PORT}"
    process = subprocess.Popen(
        [TRTSERVE, "--port", str(PORT), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline_s = time.monotonic() + 180
        while not _workers_up(url, flags):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"the server did not start: {flags}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(40)


def _workers_up(url: str, flags: tuple[str, ...]) -> bool:
    try:
        up = sum(value for name, value in metrics(url).items() if name.startswith("trtserve_worker_up"))
    except (URLError, ConnectionError):
        return False
    return up == int(flags[flags.index("--workers") + 1])


def metrics(url: str) -> dict[str, float]:
    lines = urlopen(f"{url}/metrics", timeout=20).read().decode().splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
    }


def ask(url: str, messages: list[dict[str, str]], max_tokens: int) -> str:
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0}
    request = Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    answer = json.loads(urlopen(request, timeout=300).read())
    return str(answer["choices"][0]["message"]["content"])


def converse(url: str, number: int, turns: int, max_tokens: int) -> list[str]:
    """One conversation, turn after turn."""
    messages = [{"role": "system", "content": SYSTEMS[number % len(SYSTEMS)]}]
    answers = []
    for turn in range(turns):
        topic = TOPICS[(number + turn) % len(TOPICS)]
        messages.append({"role": "user", "content": f"Tell me thing number {number} about {topic}."})
        answers.append(ask(url, messages, max_tokens))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def load(url: str, conversations: int, turns: int, at_once: int, max_tokens: int) -> list[list[str]]:
    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(lambda number: converse(url, number, turns, max_tokens), range(conversations)))


def torch_row(router: str, conversations: int, turns: int) -> tuple[list[list[str]], float, float]:
    """(answers, cached share of prompt tokens, mean TTFT in ms)."""
    flags = ("--engine", "torch", "--dtype", "float32", "--workers", "2", "--router", router)
    with server(*flags, "--engine-option", "num_threads=1") as url:
        answers = load(url, conversations, turns, at_once=3, max_tokens=16)
        now = metrics(url)
    cached = now["trtserve_cached_prompt_tokens_total"] / now["trtserve_prompt_tokens_total"]
    ttft = now["trtserve_time_to_first_token_seconds_sum"] / now["trtserve_time_to_first_token_seconds_count"]
    return answers, cached, ttft * 1000


def decision_p99_ms(url: str) -> float:
    """The upper end of the bucket that the 99th percentile lies in."""
    name = "trtserve_routing_decision_duration_seconds"
    now = metrics(url)
    total = now[f"{name}_count"]
    bounds = [
        (float(key.partition('le="')[2].partition('"')[0].replace("+Inf", "inf")), value)
        for key, value in now.items()
        if key.startswith(f"{name}_bucket")
    ]
    return next(bound for bound, value in sorted(bounds) if value >= 0.99 * total) * 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    flags = parser.parse_args()
    os.environ.setdefault("TRTSERVE_LOG_LEVEL", "warning")
    rows = {}
    for router in ("round_robin", "kv"):
        rows[router] = torch_row(router, flags.conversations, flags.turns)
        _, cached, ttft_ms = rows[router]
        print(
            f"2 torch workers, {router:11}: {cached:5.1%} of prompt tokens cached, TTFT {ttft_ms:7.1f} ms", flush=True
        )
    same = rows["kv"][0] == rows["round_robin"][0]
    gains = rows["kv"][1] > rows["round_robin"][1] and rows["kv"][2] < rows["round_robin"][2]
    print(f"answers {'identical' if same else 'DIFFER'}")
    sim = ("--engine", "sim", "--workers", "8", "--engine-option", "speedup=5", "--num-blocks", "2000")
    with server(*sim) as url:
        load(url, 96, 6, at_once=32, max_tokens=40)
        p99_ms = decision_p99_ms(url)
    print(f"8 simulated workers, kv: 99 % of decisions within {p99_ms:g} ms")
    return int(not same or not gains or p99_ms >= 1)


if __name__ == "__main__":
    sys.exit(main())
