"""Tensor operations that a faster library could replace; knows no module and no configuration."""
