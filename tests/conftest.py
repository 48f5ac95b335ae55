"""Settings of every test: offline, repeatable, no waits on a slow machine."""

import logging
import os

# Before any test module imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models: threads cost more than they give, in processes that tests start as well.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

from twotower.model.backend import PassCosts
from twotower.native import costs

# Derandomized: a red run is red for everyone; `--hypothesis-profile=explore` looks further.
settings.register_profile(
    "default-twotower",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile("default-twotower")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same global seed and one thread, whatever ran before it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_log_levels() -> None:
    """What training and serving log, in another test, is logged in no other."""
    for name in ("twotower", "twotower.serve"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def fixed_pass_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are as long on every machine: nothing is measured, and nothing kept."""
    tokens = {1: 1.0, 4: 1.2, 6: 1.4, 8: 1.5, 12: 2.0, 16: 2.1, 32: 3.4}
    monkeypatch.setattr(costs, "pass_costs", lambda *_: PassCosts(tokens, is_padded=False))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m gpu` on a machine without a CUDA device skips instead of failing."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
