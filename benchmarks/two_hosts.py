"""What does it cost to have the towers on two hosts: time and bytes per block, at three distances?

Two network namespaces stand for the hosts: joined by a veth pair, or by a line that holds every
packet back (1 and 20 ms each way), made of two TUN devices and this process. Each namespace runs
one rank under torchrun, with the command line that docs/hosts.md gives. Texts must equal those of
one process. Needs root for the namespaces.

Physical limit: a block needs one message each way, so at least one round trip; its bytes are the
new keys and values and the Mamba states (formula below), over the line's bandwidth. The last line
is one JSON object.
"""

import argparse
import contextlib
import fcntl
import heapq
import json
import logging
import os
import select
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from twotower import TwoTowerConfig
from twotower.checkpoint.files import shipped_folder
from twotower.cli.machine import recorded
from twotower.cli.main import main as twotower_command
from twotower.cli.scripts import script_parser
from twotower.families import read_config

SPACES, ADDRESSES = ("near", "far"), ("10.77.0.1", "10.77.0.2")
PROMPTS = (
    "Q: What is 47 + 38?\nA:",
    "Q: What is 12 + 95?\nA:",
    "Q: What is 8 + 77?\nA:",
)


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def set_up(space: str, device: str, address: str) -> None:
    run("ip", "link", "set", device, "netns", space)
    run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", device)
    run("ip", "-n", space, "link", "set", device, "up")
    run("ip", "-n", space, "link", "set", "lo", "up")


@contextlib.contextmanager
def hosts(delay_s: float) -> Iterator[tuple[str, str]]:
    """Two namespaces with a line between them; yields the names of their network devices."""
    with contextlib.ExitStack() as stack:
        for space in SPACES:
            run("ip", "netns", "add", space)
            stack.callback(run, "ip", "netns", "del", space)
        devices = ("line0", "line1")
        if delay_s == 0:
            run("ip", "link", "add", devices[0], "type", "veth", "peer", "name", devices[1])
        else:
            stack.enter_context(delay_line(devices, delay_s))
        for space, device, address in zip(SPACES, devices, ADDRESSES, strict=True):
            set_up(space, device, address)
        yield devices


@contextlib.contextmanager
def delay_line(names: tuple[str, str], delay_s: float) -> Iterator[None]:
    """Two TUN devices; what one sends the other gets delay_s later."""
    files = [open_tun(name) for name in names]
    stop = threading.Event()
    thread = threading.Thread(target=forward, args=(files, delay_s, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for file in files:
            os.close(file)


def open_tun(name: str) -> int:
    """A TUN device without packet headers of its own."""
    set_interface, is_tun_without_header = 0x400454CA, 0x0001 | 0x1000
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, set_interface, struct.pack("16sH", name.encode(), is_tun_without_header))
    return file


def forward(files: list[int], delay_s: float, stop: threading.Event) -> None:
    """Hand packets over when their time has come."""
    under_way: list[tuple[float, int, int, bytes]] = []  # due, number, destination, packet
    number = 0
    while not stop.is_set():
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 0.05
        for file in select.select(files, [], [], wait)[0]:
            with contextlib.suppress(BlockingIOError):
                while packet := os.read(file, 65536):
                    number += 1
                    other = files[1 - files.index(file)]
                    due = time.monotonic() + delay_s
                    heapq.heappush(under_way, (due, number, other, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, destination, packet = heapq.heappop(under_way)
            with contextlib.suppress(OSError):  # the device is down: the packet is lost
                os.write(destination, packet)


def generate_command(options: argparse.Namespace, *more: str) -> list[str]:
    flags = ["--mode", options.mode, "--max-new-tokens", str(options.new_tokens), "--json"]
    return ["generate", *PROMPTS, *flags, "--backend", "eager", *more]


def in_one_process(options: argparse.Namespace) -> list[list[int]]:
    command = [sys.executable, "-m", "twotower", *generate_command(options)]
    return read_tokens(subprocess.run(command, capture_output=True, check=True).stdout)


def read_tokens(stdout: bytes) -> list[list[int]]:
    return [row["tokens"] for row in json.loads(stdout)["results"]]


def run_rank(arguments: list[str]) -> int:
    """What torchrun starts: the command, with the line's figures in the log."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("twotower.hosts").setLevel(logging.INFO)
    return twotower_command(arguments)


def on_two_hosts(options: argparse.Namespace, devices: tuple[str, str]) -> dict[str, object]:
    """The context rank's tokens, and what its last log line says about the line."""
    ranks = []
    for rank, (space, device) in enumerate(zip(SPACES, devices, strict=True)):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        torchrun += ["--nproc-per-node", "1", "--node-rank", str(rank), "--master-port", "29511"]
        torchrun += ["--master-addr", ADDRESSES[0], __file__, "--as-rank"]
        command = ["ip", "netns", "exec", space, *torchrun]
        command += generate_command(options, "--denoiser-device", "peer")
        environment = os.environ | {"GLOO_SOCKET_IFNAME": device}
        ranks.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
            )
        )
    outputs = [rank.communicate(timeout=600) for rank in ranks]
    if any(rank.returncode for rank in ranks):
        sys.exit("\n".join(error.decode() for _, error in outputs))
    report = next(
        json.loads(line.split("line ", 1)[1])
        for line in outputs[0][1].decode().splitlines()
        if "line {" in line
    )
    return {"tokens": read_tokens(outputs[0][0]), **report}


def bytes_per_block(config: TwoTowerConfig, element_size: int) -> dict[str, int]:
    """What must travel per row and full block: new keys and values, states, and the tokens."""
    conv = config.context.conv_elements * element_size
    ssm = config.context.ssm_elements * 4
    return {
        "keys_and_values": config.block_size * config.context.kv_elements * element_size,
        "states": conv + ssm,
        "hidden": config.hidden_size * element_size,
        "masked_block": config.block_size * 8,
    }


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--mode", default="diffusion", help="decoding mode")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens decoded")
    parser.add_argument(
        "--delays-ms",
        type=float,
        nargs="+",
        default=[0, 1, 20],
        help="one-way delays of the line, in ms",
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs at each delay")
    options = parser.parse_args()
    alone = in_one_process(options)
    needed = bytes_per_block(read_config(shipped_folder()), 4)
    results = []
    for delay_ms in options.delays_ms:
        runs = []
        for _ in range(options.repeats):
            with hosts(delay_ms / 1e3) as devices:
                runs.append(on_two_hosts(options, devices))
        equal = sum(
            row == own for one in runs for row, own in zip(one["tokens"], alone, strict=True)
        )
        result = {
            "delay_ms": delay_ms,
            "equal_texts": f"{equal} of {len(alone) * len(runs)}",
            **{
                name: statistics.median(one[name] for one in runs)
                for name in runs[0]
                if name != "tokens"
            },
        }
        print(result, flush=True)
        results.append(result)
    print(
        json.dumps(
            {
                "recorded": recorded(),
                "formula_bytes": needed,
                "mode": options.mode,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-rank"]:
        sys.exit(run_rank(sys.argv[2:]))
    main()
