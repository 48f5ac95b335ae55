"""What a model needs, how fast it can be and what it costs on a machine, from arithmetic alone."""

from twotower.plan.make import make_plan
from twotower.plan.options import PlanOptions

__all__ = ["PlanOptions", "make_plan"]
