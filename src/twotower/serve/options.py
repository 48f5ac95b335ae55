"""What the server allows its callers: address, keys, limits, deadline, logs."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How the server meets its callers; nothing here changes a text, except a filter."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs API keys or --insecure."""
    port: int = 8000
    """Port to listen on; 0 takes a free one and prints it."""
    model_name: str | None = None
    """Name of the model in the API instead of its folder's."""
    api_keys_file: Path | None = None
    """File of API keys, one a line: KEY, or NAME KEY, where the name is what logs show."""
    api_keys_env: str | None = None
    """Name of an environment variable that holds API keys, separated by commas."""
    insecure: bool = False
    """Listen on a reachable address without any API key."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may call the API, such as https://example.org; none by default."""
    allowed_hosts: tuple[str, ...] = ()
    """Further host names under which this machine is called; without API keys only its own
    addresses are answered, so that no web page can reach the server under another name."""
    max_connections: int = 512
    """Most connections at a time; for one more, the one that has kept the server waiting longest
    is closed."""
    max_body_bytes: int = 1 << 20
    """Largest request body; more is refused before it is read."""
    body_timeout_s: float = 10.0
    """Seconds that a client may take to send its body."""
    max_prompt_tokens: int = 8192
    """Longest prompt."""
    max_new_tokens: int = 4096
    """Most tokens that one row may ask for."""
    max_block_size: int = 64
    """Largest block_size that a request may ask for."""
    max_steps_per_block: int = 256
    """Most denoiser passes per block or draft that a request may ask for."""
    max_rows_per_request: int = 32
    """Most rows of one request: its prompts times n."""
    key_concurrency: int | None = None
    """Most requests of one API key at a time; without keys, of one client address."""
    key_requests_per_minute: int | None = None
    """Most requests of one API key (or address) in any 60 seconds."""
    deadline_s: float = 300.0
    """Seconds after which a request that is not answered is given up."""
    grace_s: float = 30.0
    """Seconds that running requests get to finish after a signal to stop."""
    filter: tuple[str, ...] = ()
    """A pattern (regular expression), or module:function, whose match in a text ends it before
    anyone sees the match; repeat for more."""
    log_prompts: bool = False
    """Write prompts and texts to the log."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port} must be between 0 and 65535")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("body_timeout_s", "deadline_s"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number above 0")
        if not 0.0 <= self.grace_s < float("inf"):
            raise ValueError(f"grace_s={self.grace_s} must be a finite number, at least 0")
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
