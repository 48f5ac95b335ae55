"""The laboratory: what measures models and machines. Nothing of the library imports it."""
