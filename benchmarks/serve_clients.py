"""The clients of serve_load.py: users that ask, leave and send garbage. Prints one JSON line."""

import argparse
import collections
import json
import os
import random
import statistics
import time

import gevent
import locust
import requests
from locust.env import Environment

PATH = "/v1/completions"
GARBAGE = (b"", b"{", b'{"prompt": 5}', b'{"promt": "a"}', b"\xff\xfe", b"[" * 9000, b'"a"')
ENDS = ("answered", "told", "refused", "left", "lost")


def ask_for(mode: str, max_tokens: int, is_streamed: bool) -> dict[str, object]:
    """A request that nobody else sends."""
    has, buys, loses = (random.randrange(low, 90) for low in (40, 2, 2))
    question = f"Q: Zoe has {has} buttons. She buys {buys} more and loses {min(has, loses)}. "
    body: dict[str, object] = {
        "prompt": question + "How many buttons does Zoe have now?\nA:",
        "max_tokens": max_tokens,
        "stream": is_streamed,
    }
    if is_streamed:
        body["stream_options"] = {"include_usage": True}
    return body if mode == "default" else {**body, "mode": mode}


class Tally:
    """What became of the requests, and how long they took."""

    def __init__(self) -> None:
        self.sent = 0
        self.ends: collections.Counter[str] = collections.Counter()
        self.statuses: collections.Counter[str] = collections.Counter()
        self.lost_how: collections.Counter[str] = collections.Counter()
        self.malformed: collections.Counter[str] = collections.Counter()
        self.first_s: list[float] = []
        self.token_s: list[float] = []
        self.whole_s: list[float] = []
        self.tokens = 0

    def end(self, how: str, detail: str = "") -> None:
        """A request has ended."""
        self.ends[how] += 1
        if how == "lost":
            self.lost_how[detail] += 1

    def measure(self, start: float, first: float | None, count: int) -> None:
        """A stream of `count` tokens that began at `start` is whole."""
        now = time.monotonic()
        self.tokens += count
        self.whole_s.append(now - start)
        if first is not None:
            self.first_s.append(first - start)
            if count > 1:
                # The first commit is one token in the modes that are compared.
                self.token_s.append((now - first) / (count - 1))

    def record(self, seconds: float) -> dict[str, object]:
        """All of it, JSON-able."""
        return {
            "sent": self.sent,
            **{how: self.ends[how] for how in ENDS},
            "lost_how": dict(self.lost_how),
            "statuses": dict(self.statuses),
            "malformed": dict(self.malformed),
            "seconds": seconds,
            "tokens_per_s": self.tokens / seconds,
            "time_to_first_block_s": percentiles(self.first_s),
            "time_per_token_s": percentiles(self.token_s),
            "whole_answer_s": percentiles(self.whole_s),
        }


def percentiles(values: list[float]) -> dict[str, float] | None:
    if len(values) < 2:
        return None
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "max": max(values), "count": len(values)}


class Client(locust.User):
    """Asks again as soon as it is answered, but for a short pause."""

    wait_time = locust.between(0.0, 0.1)
    tally = Tally()
    args: argparse.Namespace

    def on_start(self) -> None:
        self.session = requests.Session()

    @locust.task(6)
    def stream(self) -> None:
        self.ask(is_streamed=True, leaves=False)

    @locust.task(2)
    def whole(self) -> None:
        self.ask(is_streamed=False, leaves=False)

    @locust.task(1)
    def leave(self) -> None:
        self.ask(is_streamed=True, leaves=True)

    @locust.task(1)
    def send_garbage(self) -> None:
        headers, body = {"Content-Type": "application/json"}, random.choice(GARBAGE)
        try:
            answer = self.session.post(self.args.url + PATH, body, headers=headers, timeout=60)
            self.tally.malformed[str(answer.status_code)] += 1
        except requests.RequestException as error:
            self.tally.malformed[type(error).__name__] += 1

    def ask(self, is_streamed: bool, leaves: bool) -> None:
        """One request, to its end or, if it leaves, to a moment after its first text."""
        body = ask_for(self.args.mode, self.args.max_tokens, is_streamed)
        self.tally.sent += 1
        start = time.monotonic()
        try:
            with self.session.post(
                self.args.url + PATH, json=body, stream=is_streamed, timeout=self.args.patience
            ) as answer:
                self.tally.statuses[str(answer.status_code)] += 1
                if answer.status_code != 200:
                    self.read_error(answer)
                elif is_streamed:
                    self.read_stream(answer, start, leaves)
                else:
                    self.tally.tokens += answer.json()["usage"]["completion_tokens"]
                    self.tally.whole_s.append(time.monotonic() - start)
                    self.tally.end("answered")
        except (requests.RequestException, ValueError, KeyError) as error:
            self.tally.end("lost", type(error).__name__)
            self.session = requests.Session()

    def read_error(self, answer: requests.Response) -> None:
        if answer.status_code in (429, 503):
            self.tally.end("refused")
            gevent.sleep(min(2.0, float(answer.headers.get("Retry-After", 1))))
        elif answer.status_code in (500, 504) and "message" in answer.json()["error"]:
            self.tally.end("told")
        else:
            self.tally.end("lost", f"status {answer.status_code}")

    def read_stream(self, answer: requests.Response, start: float, leaves: bool) -> None:
        """To the last line; whoever leaves closes the connection with its answer unread."""
        first, usage, error = None, None, None
        for line in answer.iter_lines():
            if line == b"data: [DONE]":
                break
            record = json.loads(line[6:]) if line.startswith(b"data: ") else {}
            usage, error = record.get("usage") or usage, record.get("error") or error
            if first is None and record.get("choices") and record["choices"][0]["text"]:
                first = time.monotonic()
                if leaves:
                    gevent.sleep(random.uniform(0.0, 0.3))
                    self.tally.end("left")
                    return
        else:
            self.tally.end("lost", "stream without an end")
            return
        if usage is None:
            self.tally.end("told" if error else "lost", "stream without usage")
            return
        self.tally.end("answered")
        self.tally.measure(start, first, usage["completion_tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True, help="address of the server")
    parser.add_argument("--clients", type=int, required=True, help="clients at the same time")
    parser.add_argument("--minutes", type=float, required=True, help="duration, in minutes")
    parser.add_argument(
        "--max-tokens", type=int, required=True, help="maximum number of new tokens per request"
    )
    parser.add_argument(
        "--patience", type=float, required=True, help="seconds that a client waits for an answer"
    )
    parser.add_argument("--mode", required=True, help="decoding mode, or default")
    Client.args = args = parser.parse_args()
    tally = Client.tally
    runner = Environment(user_classes=[Client]).create_local_runner()
    start = time.monotonic()
    runner.start(args.clients, spawn_rate=args.clients)
    gevent.sleep(args.minutes * 60)
    Client.wait_time = lambda self: 3600.0  # whoever is answered now asks no more
    end = time.monotonic() + args.patience
    while tally.sent > sum(tally.ends.values()) and time.monotonic() < end:
        gevent.sleep(0.1)
    for _ in range(tally.sent - sum(tally.ends.values())):
        tally.end("lost", "no end within the client's patience")
    print(json.dumps(tally.record(time.monotonic() - start)), flush=True)
    os._exit(0)  # clients that sleep would hold up the end


if __name__ == "__main__":
    main()
