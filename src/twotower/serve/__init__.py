"""The model behind OpenAI's API: validation, limits, streaming and the page.

Sees engine records, never a tensor. Its modules import the web framework (extra `serve`); this one
and `options` do not, so that flags and help work without it.
"""

from twotower.serve.options import ServeOptions

__all__ = ["ServeOptions"]
