"""What a model needs, how fast it can be and what it costs on a machine, from arithmetic alone."""

from twotower.lab.plan.make import make_plan
from twotower.lab.plan.options import PlanOptions

__all__ = ["PlanOptions", "make_plan"]
