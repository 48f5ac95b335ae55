"""What the server allows its callers: address, keys, limits, deadline, logs."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from twotower.arguments import ABOVE_ZERO, COUNT, check_fields, nonempty, number

_TEMPLATE_OWN = {
    "messages", "tools", "add_generation_prompt", "continue_final_message",
    "raise_exception", "strftime_now", "self",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Address, keys, limits and log of the server. Only --filter changes a text."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but a loopback address needs API keys or --insecure."""
    port: int = 8000
    """Port to listen on; 0: a free one, which is printed."""
    model_name: str | None = None
    """Name of the model in the API. Default: that of its folder."""
    api_keys_file: Path | None = None
    """File of API keys, one a line: KEY, or NAME KEY, whose name is shown in logs."""
    api_keys_env: str | None = None
    """Name of an environment variable that holds API keys, separated by commas."""
    insecure: bool = False
    """Allow an address that is not loopback without API keys."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may call the API, such as https://example.org."""
    allowed_hosts: tuple[str, ...] = ()
    """More values of the Host header to answer. Without API keys only localhost and loopback
    addresses are answered, as a protection against DNS rebinding."""
    max_connections: int = 512
    """Maximum number of open connections. A new one beyond it closes the one that has been idle
    longest."""
    max_body_bytes: int = 1 << 20
    """Maximum size of a request body; a larger one is refused before it is read."""
    body_timeout_s: float = 10.0
    """Seconds in which a request body must have arrived."""
    max_prompt_tokens: int = 8192
    """Maximum number of tokens of a prompt."""
    max_new_tokens: int = 4096
    """Maximum value of max_tokens in a request."""
    max_block_size: int = 64
    """Maximum value of block_size in a request."""
    max_steps_per_block: int = 256
    """Maximum value of steps_per_block and draft_passes in a request."""
    max_rows_per_request: int = 32
    """Maximum number of rows of a request: its prompts times n."""
    key_concurrency: int | None = None
    """Maximum number of concurrent requests of an API key, or of a client address without keys."""
    key_requests_per_minute: int | None = None
    """Maximum number of requests of an API key (or address) in any 60 seconds."""
    deadline_s: float = 300.0
    """Seconds after which an unfinished request is aborted."""
    grace_s: float = 30.0
    """Seconds in which running requests may finish after SIGTERM or SIGINT."""
    filter: tuple[str, ...] = ()
    """Regular expressions, or functions as module:function, whose match ends a text before the
    match is sent."""
    log_prompts: bool = False
    """Write prompts and texts to the log."""

    def __post_init__(self) -> None:
        check_fields(self, _CHECKS)
        for origin in self.cors_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ValueError(
                    f"cors_origins={origin!r} must be * or begin with http:// or https://"
                )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False  # a name: it may resolve to anything


_COUNTS = (
    "max_connections",
    "max_body_bytes",
    "max_prompt_tokens",
    "max_new_tokens",
    "max_block_size",
    "max_steps_per_block",
    "max_rows_per_request",
    "key_concurrency",
    "key_requests_per_minute",
)
_CHECKS = {
    **dict.fromkeys(_COUNTS, COUNT),
    **dict.fromkeys(("body_timeout_s", "deadline_s"), ABOVE_ZERO),
    "grace_s": number(0),
    "port": number(0, 65535, is_whole=True),
    **dict.fromkeys(("host", "model_name"), nonempty),
}


def check_variables(variables: Mapping[str, object]) -> None:
    """ValueError (one line) for variables of a chat template that every prompt has of its own."""
    for name in variables:
        if name in _TEMPLATE_OWN or name.endswith("_token"):
            raise ValueError(f"chat_template_kwargs: {name} is each prompt's own; leave it out")
