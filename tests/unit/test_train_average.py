"""The moving average of the trained weights: its definition, and who uses it."""

from pathlib import Path

import pytest
import torch

from tiny_denoiser import denoiser, exported, make_backbone, run
from tiny_training import make_shard, saved_tensors
from twotower.train.optimizer import WeightAverage
from twotower.train.run_folder import RunFolder


def test_average_follows_its_definition() -> None:
    """value <- d value + (1 - d) weight, d = min(decay, step / (step + 10))."""
    layer = torch.nn.Linear(1, 1, bias=False)
    frozen = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    model = torch.nn.ModuleDict({"a": layer, "b": frozen})
    with torch.no_grad():
        layer.weight.fill_(0.0)
        average = WeightAverage(model, 0.2)
        assert average.values.keys() == {"a.weight"}
        expected = 0.0
        for step, decay in ((1, 1 / 11), (2, 2 / 12), (3, 0.2), (4, 0.2)):
            layer.weight.fill_(float(step))
            average.update(step)
            expected = decay * expected + (1 - decay) * step
    assert average.values["a.weight"].item() == pytest.approx(expected, rel=1e-6)
    with average.in_the_model():
        assert layer.weight.item() == pytest.approx(expected, rel=1e-6)
    assert layer.weight.item() == 4.0


def test_average_is_what_is_evaluated_and_exported(tmp_path: Path) -> None:
    """Silent failure: the average is kept up to date and never used, or training starts from it."""
    data = make_shard(tmp_path / "shard")
    backbone = make_backbone(data, tmp_path / "backbone")
    changes = {
        "steps": 6,
        "learning_rate": 0.02,
        "warmup_steps": 0,
        "eval_every": 6,
        "eval_rows": 8,
    }
    plain = denoiser(data, backbone, tmp_path / "plain", **changes)
    averaged = denoiser(data, backbone, tmp_path / "averaged", ema_decay=0.9, **changes)
    one, two = run(plain), run(averaged)
    assert [r.loss for r in one] == [r.loss for r in two]
    assert one[-1].validation_loss != two[-1].validation_loss
    newest = RunFolder(averaged.run_folder).newest()
    average, weights = saved_tensors(newest, "average."), saved_tensors(newest)
    written = exported(averaged).state_dict()
    last = exported(plain).state_dict()
    assert average.keys() == {n for n in last if not n.startswith("context_")}
    for name, value in average.items():
        assert torch.equal(written[name], value), name
        assert torch.equal(weights[name], last[name]), name
    assert not torch.equal(written["lm_head.weight"], last["lm_head.weight"])
