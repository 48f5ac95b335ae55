"""Passes of fixed shapes over memory at fixed addresses, which a GPU records once and replays."""
