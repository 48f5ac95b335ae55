"""The two towers in two processes, on one host or on two: a context rank and a denoiser rank.

Per block the new keys, values and states go one way and the filled block the other; the denoiser
rank keeps its own copy of the cache. Docs: docs/hosts.md.
"""

from twotower.hosts.context_rank import ApartTwoTower
from twotower.hosts.denoiser_rank import serve_blocks
from twotower.hosts.link import Link, Message, PeerLostError, join_ranks

__all__ = ["ApartTwoTower", "Link", "Message", "PeerLostError", "join_ranks", "serve_blocks"]
