"""The two towers and the state that passes between them."""

from twotower.model.state import ContextCache, ContextView, ForwardOutput
from twotower.model.two_tower import TwoTower

__all__ = ["ContextCache", "ContextView", "ForwardOutput", "TwoTower"]
