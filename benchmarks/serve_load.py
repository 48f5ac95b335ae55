"""Does a server lose anyone under load, faults and bad input, and what does each mode give?

N clients of locust ask for M minutes, first in the checkpoint's own mode, then in `ar`: streams and
whole answers, some that go away in the middle, some that send garbage; now and then the decoding
thread is killed. Every request ends in one of these: answered, told (an error in OpenAI's shape),
refused (429 or 503), left (by us) or lost (no end, a broken connection, another status), which must
be 0. Physical limit: the passes of one machine, shared by all rows. Times are what a client sees,
waiting included. The last line is one JSON object.

Three processes: this one; the server, `twotower serve` with a signal that kills its decoding
thread; the clients (serve_clients.py), for locust patches whatever it is loaded into.
"""

import argparse
import ctypes
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from importlib.metadata import version

from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser

CLIENTS = pathlib.Path(__file__).with_name("serve_clients.py")
ENDS = ("answered", "told", "refused", "left", "lost")


def serve(arguments: list[str]) -> int:
    """The server's process: the ordinary command, and SIGUSR1 ends its decoding thread."""
    from twotower.cli.main import main

    def kill(*_: object) -> None:
        for thread in threading.enumerate():
            if thread.name == "twotower-worker" and thread.ident is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
                )

    signal.signal(signal.SIGUSR1, kill)
    return main(["serve", *arguments])


class Server:
    """The server's process and what its metrics say."""

    def __init__(self, args: argparse.Namespace, log: str) -> None:
        # Clients repeat their prompts: drafts out of earlier answers would be theirs.
        command = [sys.executable, __file__, "--serve", "--port", "0"]
        command += ["--lookup-cache-bytes", "0", *args.server]
        if args.model is not None:
            command += ["--model", args.model]
        self.log = log
        with open(log, "w") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+(?=/v1)", line)
        if found is None:
            sys.exit(f"the server did not start: {line}; see {log}")
        self.url = found[0]

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def memory_mb(self) -> float:
        return self.metric("process_resident_memory_bytes") / 1e6

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=120)


def load(server: Server, args: argparse.Namespace, mode: str) -> dict[str, object]:
    """One mode's load, with kills at even intervals and the server's memory over time."""
    flags = {"clients": args.clients, "minutes": args.minutes, "max-tokens": args.max_tokens}
    flags |= {"patience": args.patience, "mode": mode, "url": server.url}
    command = [sys.executable, str(CLIENTS)]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    before = server.memory_mb()
    restarts = server.metric("twotower_worker_restarts_total")
    start, memory, kills = time.monotonic(), [], 0
    pause_s = args.minutes * 60 / (args.kills + 1)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as clients:
        while clients.poll() is None:
            time.sleep(1.0)
            passed = time.monotonic() - start
            memory.append([round(passed, 1), server.memory_mb()])
            if kills < args.kills and passed > pause_s * (kills + 1):
                server.process.send_signal(signal.SIGUSR1)
                kills += 1
        assert clients.stdout is not None
        result: dict[str, object] = json.loads(clients.stdout.read().splitlines()[-1])
    wait_until_idle(server)
    return {
        "mode": mode,
        **result,
        "kills": kills,
        "restarts": server.metric("twotower_worker_restarts_total") - restarts,
        "memory_mb": {"before": before, "after": server.memory_mb(), "series": memory},
        "open_files": server.metric("process_open_fds"),
    }


def wait_until_idle(server: Server, timeout_s: float = 30.0) -> None:
    """Until no row is left; a row that nobody waits for would be a leak."""
    end = time.monotonic() + timeout_s
    while server.metric("twotower_rows_in_flight") + server.metric("twotower_rows_waiting"):
        if time.monotonic() > end:
            sys.exit("rows are left although all clients have gone")
        time.sleep(0.2)


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--clients", type=int, default=32, help="clients at the same time")
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="duration of each mode, in minutes"
    )
    parser.add_argument(
        "--modes", nargs="+", default=["default", "ar"], help="decoding modes, or default"
    )
    parser.add_argument(
        "--kills",
        type=int,
        default=4,
        help="times that the decoding thread is killed, in each mode",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=64, help="maximum number of new tokens per request"
    )
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds that a client waits for an answer"
    )
    parser.add_argument(
        "--model", help="checkpoint folder, GGUF file or hub id; without it the shipped model"
    )
    parser.add_argument("--log", default="serve_load.log", help="file of the server's log")
    parser.add_argument(
        "--server",
        nargs=argparse.REMAINDER,
        default=[],
        help="all that follows: flags of twotower serve",
    )
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve(sys.argv[2:]))
    args = parse_arguments()
    server = Server(args, args.log)
    try:
        results = [load(server, args, mode) for mode in args.modes]
    finally:
        status = server.stop()
    for result in results:
        counts = ", ".join(f"{how} {result[how]}" for how in ("sent", *ENDS))
        print(f"{result['mode']}: {counts}; malformed {result['malformed']}")
    names = ("torch", "fastapi", "uvicorn", "locust")
    print(
        json.dumps(
            {
                "recorded": recorded(),
                "results": results,
                "server_exit": status,
                "settings": {k: v for k, v in vars(args).items() if k != "log"},
                "versions": {name: version(name) for name in names},
                "cores": len(os.sched_getaffinity(0)),
            }
        )
    )
    lost = sum(int(str(result["lost"])) for result in results)
    sys.exit(1 if lost or status else 0)


if __name__ == "__main__":
    main()
