"""The two towers in two processes, on one host or on two: a context rank and a denoiser rank.

Per block the new keys, values and states go one way and the filled block the other; the denoiser
rank keeps its own copy of the cache. Docs: docs/hosts.md.
"""

from twotower.hosts.link import Link, Message, PeerLostError, join_ranks
from twotower.hosts.ranks import SplitTwoTower, serve_blocks

__all__ = ["Link", "Message", "PeerLostError", "SplitTwoTower", "join_ranks", "serve_blocks"]
