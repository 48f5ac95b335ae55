"""Who may call: API keys from a file or the environment, compared in constant time."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from twotower.serve.options import ServeOptions


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
            raise ValueError(
                f"api_keys_file: cannot read {options.api_keys_file} ({error})"
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
        raise ValueError(f"{source} holds no key; write one a line")
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
