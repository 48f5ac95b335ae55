"""How many tokens a second does a server give to N clients, and how soon, beside llama.cpp's?

Both servers have the same model at the same bits and as many slots as there are clients. One is
loaded after the other: each client sends one chat at a time, greedy and streamed, until all prompts
are answered. Our modes are asked for in the request. Times are what a client sees, waiting
included. Physical limit: a step of all rows reads the weights once and each row's keys and values.
The last line is one JSON object.

    twotower convert smollm2.gguf q8_0.gguf --to gguf --dtype q8_0
    python benchmarks/serve_throughput.py smollm2.gguf q8_0.gguf gsm8k.jsonl mt_bench.jsonl
"""

import http.client
import json
import queue
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser

NAME, RIVAL = "model", "llama.cpp"
CONTEXT = 2048  # tokens of a slot of llama.cpp
SERVERS = (RIVAL, "ar", "speculative")


class Answer(NamedTuple):
    """What a client has seen of one request: seconds to its first text and to its end."""

    first_s: float
    all_s: float
    tokens: int
    text: str


def ask(address: str, prompt: str, max_tokens: int, mode: str | None) -> Answer:
    """One streamed chat. mode: of our decoding."""
    body = ({} if mode is None else {"mode": mode}) | {
        "model": NAME,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection, began = http.client.HTTPConnection(address, timeout=600), time.perf_counter()
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    if response.status != 200:
        raise OSError(f"{address}: {response.status} {response.read().decode()}")
    first, text, tokens = 0.0, "", 0
    for line in response:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line[len(b"data: ") :])
        for choice in event.get("choices", ()):
            text += choice["delta"].get("content") or ""
        first = first or (time.perf_counter() - began if text else 0.0)
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    connection.close()
    return Answer(first, time.perf_counter() - began, tokens, text)


def load(
    address: str, prompts: list[str], clients: int, max_tokens: int, mode: str | None
) -> list[Answer]:
    """The answers to all prompts, by so many clients at a time."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(prompts)):
        waiting.put(index)
    answers: dict[int, Answer] = {}

    def work() -> None:
        while True:
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            answers[index] = ask(address, prompts[index], max_tokens, mode)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(answers) < len(prompts):
        sys.exit(f"{address}: {len(prompts) - len(answers)} prompts have no answer; see above")
    return [answers[index] for index in range(len(prompts))]


def summary(answers: list[Answer], seconds: float) -> dict[str, float]:
    """Tokens a second of all clients together, and medians of what each has waited."""
    tokens = sum(answer.tokens for answer in answers)
    waits = ((a.all_s - a.first_s) / max(1, a.tokens - 1) for a in answers)
    return {
        "seconds": round(seconds, 2),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
        "first_ms": round(1e3 * statistics.median(answer.first_s for answer in answers), 1),
        "token_ms": round(1e3 * statistics.median(waits), 2),
    }


@contextmanager
def process_of(command: list[str]) -> Iterator[str]:
    """A server's address, while it runs."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = None
            for line in server.stdout:
                if found := re.search(r"http://([\w.]+:\d+)", line):
                    break
            if found is None:
                sys.exit(f"the server did not start: {' '.join(command)}")
            yield found[1]
        finally:
            server.terminate()


def llama_cpp(file: str, threads: int, slots: int) -> None:
    """llama.cpp's server, as it is by default, until this process is ended."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = file
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    options.n_parallel, options.n_ctx = slots, slots * CONTEXT
    options.n_gpu_layers, options.fit_params, options.ui, options.verbosity = 0, False, False, 1
    server = xllamacpp.Server(options)
    print(server.listening_address, flush=True)
    threading.Event().wait()


def measure(args: Any, prompts: list[str], threads: int, clients: int) -> dict[str, Any]:
    """Each server in turn."""
    own = ["twotower", "serve", "--model", args.model, "--quantization", args.quantization]
    own += ["--threads", str(threads), "--batch-size", str(clients), "--model-name", NAME]
    own += ["--port", "0", *(["--denoiser", args.denoiser] if args.denoiser else [])]
    rival = [sys.executable, __file__, "--llama-cpp", args.rival, str(threads), str(clients)]
    found: dict[str, Any] = {"threads": threads, "clients": clients}
    texts: dict[str, list[str]] = {}
    for server in SERVERS:
        mode, command = (None, rival) if server == RIVAL else (server, own)
        with process_of(command) as address:
            ask(address, prompts[-1], 8, mode)  # the first request makes what later ones use
            began = time.perf_counter()
            answers = load(address, prompts, clients, args.max_tokens, mode)
            found[server] = summary(answers, time.perf_counter() - began)
        texts[server] = [answer.text for answer in answers]
        print(threads, clients, server, found[server], flush=True)
    pairs = zip(texts["ar"], texts["speculative"], strict=True)
    return {**found, "same_texts": sum(one == other for one, other in pairs)}


def main() -> None:
    if sys.argv[1:2] == ["--llama-cpp"]:
        llama_cpp(sys.argv[2], *map(int, sys.argv[3:]))
    parser = script_parser(__doc__)
    parser.add_argument("model", help="checkpoint folder or GGUF file for twotower serve")
    parser.add_argument("rival", help="the same model's GGUF file for llama.cpp, at the same bits")
    parser.add_argument("prompts", nargs="+", help="files of prompts, a JSON object a line")
    parser.add_argument("--denoiser", help="folder of a thin denoiser")
    parser.add_argument("--quantization", default="int8", help="of our weights: int8 or int4")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of a forward pass")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="at a time")
    parser.add_argument("--items", type=int, default=16, help="prompts of each file")
    parser.add_argument(
        "--max-tokens", type=int, default=96, help="maximum number of new tokens per answer"
    )
    args = parser.parse_args()
    prompts = [
        json.loads(line)["prompt"]
        for file in args.prompts
        for line in Path(file).read_text(encoding="utf-8").splitlines()[: args.items]
    ]
    runs = [
        measure(args, prompts, threads, clients)
        for threads in args.threads
        for clients in args.clients
    ]
    settings = {**vars(args), "prompts": len(prompts)}
    print(json.dumps({"recorded": recorded(), "settings": settings, "results": runs}))


if __name__ == "__main__":
    main()
