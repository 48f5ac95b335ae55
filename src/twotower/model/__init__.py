"""The two towers and the state that passes between them."""

from twotower.model.state import ContextCache, ForwardOutput
from twotower.model.two_tower import TwoTower
from twotower.model.view import ContextView

__all__ = ["ContextCache", "ContextView", "ForwardOutput", "TwoTower"]
