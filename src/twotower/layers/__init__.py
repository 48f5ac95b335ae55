"""The mathematics of one layer: past state in, new state out, nothing stored.

A layer here knows no tower, cache, training or serving: prefill, decode, block extension,
denoising and training are the same call with other inputs.
"""
