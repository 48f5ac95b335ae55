"""The towers in two processes: `generate` under torchrun, and what happens when one is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PROMPTS = ["Q: What is 47 + 38?\nA:", "Q: What is 5 + 8?\nA:"]
FLAGS = ["--executor", "eager", "--max-new-tokens", "40", "--json"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def start(*command: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def texts(stdout: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(stdout[stdout.index("{") :])["results"]
    return found


def test_texts_of_two_processes_are_those_of_one() -> None:
    """Guards the line between the towers: tokens, passes and ends must not depend on it."""
    command = ["twotower", "generate", *PROMPTS, *FLAGS, "--mode", "speculative"]
    alone = start("-m", *command)
    apart = start(*TORCHRUN, *command, "--denoiser-device", "peer")
    one, two = alone.communicate(timeout=120), apart.communicate(timeout=120)
    assert (alone.returncode, apart.returncode) == (0, 0), one[1] + two[1]
    assert texts(two[0]) == texts(one[0])


def test_without_torchrun_there_is_no_peer() -> None:
    alone = start("-m", "twotower", "generate", "x", "--denoiser-device", "peer")
    _, error = alone.communicate(timeout=60)
    assert alone.returncode == 2
    assert "torchrun" in error and len(error.strip().splitlines()) == 1


def test_a_lost_denoiser_ends_the_context_rank_with_a_line(tmp_path: Path) -> None:
    """Guards against two processes that wait for each other for ever."""
    ranks = [start_rank(rank, tmp_path) for rank in (0, 1)]
    try:
        wait_for(tmp_path / "ready")
        os.kill(ranks[1].pid, signal.SIGKILL)
        began = time.monotonic()
        _, error = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode == 1
        assert "lost the other rank" in error
        assert time.monotonic() - began < 30
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


# Decodes block after block until the other rank is gone; touches a file after the first.
RANK = """
import sys
from pathlib import Path
import torch
from tiny_models import prompts_of, tiny_model
from twotower import GenerateOptions, generate
from twotower.hosts import ApartTwoTower, Link, PeerLostError, join_ranks, serve_blocks

rank = join_ranks(8.0)
link = Link(1 - rank, 8.0)
if rank == 1:
    serve_blocks(tiny_model(), link)
model = ApartTwoTower(tiny_model(), link)
try:
    while True:
        generate(model, prompts_of([5]), GenerateOptions(mode="diffusion", max_new_tokens=8))
        Path(sys.argv[1]).touch()
except PeerLostError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""


def start_rank(rank: int, folder: Path) -> "subprocess.Popen[str]":
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    return subprocess.Popen(
        [sys.executable, "-c", RANK, str(folder / "ready")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, "the ranks decoded nothing within a minute"
        time.sleep(0.1)
