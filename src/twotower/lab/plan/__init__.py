"""What a model needs, how fast it can be and what it costs on a machine, from arithmetic alone."""

from twotower.lab.plan.options import PlanOptions
from twotower.lab.plan.record import make_plan

__all__ = ["PlanOptions", "make_plan"]
