"""The towers in two processes: `generate` under torchrun, and what happens when one is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROMPTS = ["Q: What is 47 + 38?\nA:", "Q: What is 5 + 8?\nA:"]
FLAGS = ["--max-new-tokens", "40", "--json"]
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
    ranks = [start_rank(rank, RANK, str(tmp_path / "ready")) for rank in (0, 1)]
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


@pytest.mark.parametrize("busy", [0, 1])
def test_a_rank_that_is_busy_for_longer_than_the_timeout_is_not_lost(busy: int) -> None:
    """Guards loading, long passes and a server without requests: gloo ends a line on which one side
    sends and the other does not listen.
    """
    ranks = [start_rank(rank, BUSY, str(busy)) for rank in (0, 1)]
    try:
        ends = [rank.communicate(timeout=120) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], ends
        assert [output for output, _ in ends] == ["answer 5000000 34\n", "ask\nend\n"]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_a_rank_that_waits_for_one_that_does_not_start_says_so() -> None:
    alone = start_rank(0, "from twotower.hosts import join_ranks; join_ranks(2)")
    _, error = alone.communicate(timeout=60)
    assert "the other rank did not start within 2 s" in error.splitlines()[-1]


# Ask, answer, end; one rank is busy first. The answer is larger than a frame.
BUSY = """
import sys
import time
import torch
from twotower.hosts import Link, Message, join_ranks

rank = join_ranks(60)
link = Link(1 - rank, 2.0)
if rank == int(sys.argv[1]):
    time.sleep(5)
if rank == 0:
    link.send(Message("ask"))
    answer = link.receive()
    numbers = answer.tensors[0]
    print(answer.kind, len(numbers), int(numbers[-5] + numbers[-1]))
    link.close()
else:
    print(link.receive().kind)
    link.send(Message("answer", tensors=[torch.arange(5_000_000) % 20]))
    print(link.receive().kind)
"""

# Decodes block after block until the other rank is gone; touches a file after the first.
RANK = """
import sys
from pathlib import Path
import torch
from tiny_models import prompts_of, tiny_model
from twotower import GenerateOptions, generate
from twotower.hosts import SplitTwoTower, Link, PeerLostError, join_ranks, serve_blocks

rank = join_ranks(8.0)
link = Link(1 - rank, 8.0)
if rank == 1:
    serve_blocks(tiny_model(), link)
model = SplitTwoTower(tiny_model(), link)
try:
    while True:
        generate(model, prompts_of([5]), GenerateOptions(mode="diffusion", max_new_tokens=8))
        Path(sys.argv[1]).touch()
except PeerLostError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""


def start_rank(rank: int, *script: str) -> "subprocess.Popen[str]":
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        ),
    }
    return subprocess.Popen(
        [sys.executable, "-c", *script],
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
