"""The filter of system calls in the sandbox, read as the kernel reads it, for each processor."""

import os
import struct

import pytest

from twotower.lab.evaluate.jail import call_filter


def filtered(machine: str, architecture: int, number: int, *arguments: int) -> int:
    """What the kernel's packet filter answers to a call: the program, interpreted."""
    data = struct.pack("IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    program, at, value = call_filter(machine), 0, 0
    while True:
        code, is_so, otherwise, operand = struct.unpack_from("HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("I", data, operand)
        elif code == 0x54:
            value &= operand
        elif code == 0x06:
            return int(operand)
        else:
            assert code == 0x15
            at += is_so if value == operand else otherwise


NUMBERS = {
    "x86_64": (0xC000003E, 1, 257, 72, 62, 41),
    "aarch64": (0xC00000B7, 64, 56, 25, 129, 198),
}


@pytest.mark.parametrize("machine", NUMBERS)
def test_the_filter_of_each_processor(machine: str) -> None:
    """Silent failure: the filter lets a call through that a test of this machine cannot make."""
    architecture, write, openat, fcntl, kill, socket = NUMBERS[machine]
    allow, refuse, end = 0x7FFF0000, 0x00050001, 0x80000000
    assert filtered(machine, architecture, write) == allow
    for number in (kill, socket, 425, 435, 437, 440, 500, 0x40000000 | write):
        assert filtered(machine, architecture, number) == refuse
    assert filtered(machine, architecture ^ 1, write) == end
    for flags in (os.O_RDONLY, os.O_CLOEXEC, os.O_DIRECTORY):
        assert filtered(machine, architecture, openat, 0, 0, flags) == allow
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_RDWR | 0o20200000):
        assert filtered(machine, architecture, openat, 0, 0, flags) == refuse
    assert filtered(machine, architecture, fcntl, 0, 3) == allow
    for command in (4, 8, 10, 1024):  # O_ASYNC, who gets signals, which signal, leases
        assert filtered(machine, architecture, fcntl, 0, command) == refuse
    assert len(call_filter(machine)) < 8 * 4096  # the kernel's limit
