"""A thin denoiser for a backbone: its own answers, what a denoiser reads of them, training, report.

Docs: docs/adapt.md.
"""
