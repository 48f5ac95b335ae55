"""Who may call and how often: API keys, compared in constant time, and limits for each caller."""

import hashlib
import hmac
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from twotower.serve.errors import ApiError
from twotower.serve.options import ServeOptions

_WINDOW_S = 60.0
_MANY_CALLERS = 4096  # above it, and then at every doubling, callers who are idle are forgotten


@dataclass(frozen=True)
class Keys:
    """Names of the callers by the SHA-256 of their keys; no key is kept in readable form."""

    names: Mapping[bytes, str]

    def __bool__(self) -> bool:
        return bool(self.names)

    def caller(self, header: str | None) -> str | None:
        """Name of the key in an Authorization header; None if it is not one of ours.

        Looks at every key, so that the time tells nothing about which one was near.
        """
        scheme, _, key = (header or "").partition(" ")
        digest = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        found = None
        for known, name in self.names.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found


def read_keys(options: ServeOptions, environment: Mapping[str, str]) -> Keys:
    """The keys that the options name; ValueError (one line) where there are none or bad ones."""
    lines: list[str] = []
    if options.api_keys_file is not None:
        try:
            text = options.api_keys_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", error)
            raise ValueError(
                f"api_keys_file: cannot read {options.api_keys_file} ({reason})"
            ) from None
        lines += _lines(text, f"api_keys_file: {options.api_keys_file}")
    if options.api_keys_env is not None:
        value = environment.get(options.api_keys_env, "").replace(",", "\n")
        lines += _lines(value, f"api_keys_env: the variable {options.api_keys_env}")
    return Keys({_digest(key): name for name, key in map(_named, range(1, 1 + len(lines)), lines)})


def check_exposure(options: ServeOptions, keys: Keys) -> None:
    """ValueError when anyone on the network could use the server."""
    if not keys and not options.is_loopback and not options.insecure:
        raise ValueError(
            f"host={options.host} can be reached from other machines and there is no API key; "
            "give --api-keys-file FILE or --api-keys-env NAME, or accept it with --insecure"
        )


def _lines(text: str, source: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError(f"{source} holds no key; give at least one")
    return lines


def _named(number: int, line: str) -> tuple[str, str]:
    name, key = [f"key-{number}", line] if len(line.split()) == 1 else line.split(None, 1)
    if len(key.split()) != 1 or not key.isascii() or len(key) < 8:
        raise ValueError(
            f"API key {number} ({name}) must be one word of 8 or more ASCII characters"
        )
    return name, key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


@dataclass
class _Usage:
    running: int = 0
    started: deque[float] = field(default_factory=deque)  # seconds of the clock, oldest first


class Limits:
    """Counts each caller's requests. For one thread: the server's event loop."""

    def __init__(
        self,
        concurrency: int | None,
        per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._concurrency = concurrency
        self._per_minute = per_minute
        self._clock = clock
        self._callers: dict[str, _Usage] = {}
        self._many = _MANY_CALLERS

    def enter(self, caller: str) -> None:
        """Count a request that begins; ApiError 429 when it is one too many."""
        usage, now = self._callers.setdefault(caller, _Usage()), self._clock()
        _forget_before(usage, now - _WINDOW_S)
        if self._concurrency is not None and usage.running >= self._concurrency:
            raise _refusal("key_concurrency", f"{self._concurrency} requests at a time", 1)
        if self._per_minute is not None:
            if len(usage.started) >= self._per_minute:
                wait_s = math.ceil(usage.started[0] + _WINDOW_S - now)
                raise _refusal("key_rate", f"{self._per_minute} requests a minute", max(1, wait_s))
            usage.started.append(now)
        usage.running += 1
        if len(self._callers) > self._many:
            self._forget_idle(now)

    def leave(self, caller: str) -> None:
        """The request has ended."""
        usage = self._callers.get(caller)
        assert usage is not None and usage.running > 0
        usage.running -= 1

    def _forget_idle(self, now: float) -> None:
        for usage in self._callers.values():
            _forget_before(usage, now - _WINDOW_S)
        self._callers = {c: u for c, u in self._callers.items() if u.running or u.started}
        self._many = max(_MANY_CALLERS, 2 * len(self._callers))


def _forget_before(usage: _Usage, moment: float) -> None:
    while usage.started and usage.started[0] <= moment:
        usage.started.popleft()


def _refusal(code: str, limit: str, wait_s: int) -> ApiError:
    return ApiError(
        429,
        f"your limit of {limit} is reached; try again in {wait_s} s",
        code=code,
        headers={"Retry-After": str(wait_s)},
    )
