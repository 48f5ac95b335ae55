"""Every recorded tensor, token and step of the official implementation against ours.

Tolerances and their reasons: docs/numerics.md. `scripts/conformance_table.py` prints the same
comparison as a table, also for cases that are not in this repository.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import recorded
from recorded import GOLDEN, Case, Run
from twotower import GenerateOptions, StepTaken, TwoTower, accelerate, generate, masks, stream
from twotower.layers.adaln import TimestepEmbedder, time_features

CASES = recorded.read_cases()
FLOAT32 = [case for case in CASES if case.is_exact]
SAMPLER = load_file(GOLDEN / "sampler" / "golden.safetensors")
TIMES = torch.tensor(
    json.loads((GOLDEN / "sampler" / "golden_public.json").read_text())["time_features_t"]
)


def name(value: object) -> str:
    return value.folder.name if isinstance(value, Case) else str(value)


every_case = pytest.mark.parametrize("case", CASES, ids=name)
every_float32_case = pytest.mark.parametrize("case", FLOAT32, ids=name)


def wrong(case: Case, model: TwoTower, runs: list[Run]) -> list[str]:
    """The runs whose tokens or number of denoiser passes differ from the recording.

    float32: all in one call, so that prompts of different lengths and options share batches.
    bfloat16: one by one, as recorded; another batch size may round a matrix product otherwise.
    """
    prompts, options = [run.prompt for run in runs], [run.options for run in runs]
    if case.is_exact:
        found = generate(model, prompts, options)
    else:
        found = [generate(model, [p], o)[0] for p, o in zip(prompts, options, strict=True)]
    return [
        f"{run.name}: {ours.nfe} passes instead of {run.nfe}, {ours.tokens}"
        for run, ours in zip(runs, found, strict=True)
        if ours.tokens != run.tokens or run.nfe not in (None, ours.nfe)
    ]


def test_all_cases_are_here() -> None:
    assert [case.folder.name for case in CASES] == ["case_01", "case_02", "case_03"]


@every_case
def test_every_recorded_tensor(case: Case) -> None:
    """Guards logits, KV, conv and SSM states of both towers against any change of the arithmetic:
    a wrong state can leave the logits of the next token right and ruin later ones."""
    found = list(recorded.replay(case.model, case))
    assert {one.key for one in found} == case.keys
    worse = {
        one.key: difference
        for one in found
        if not (difference := case.difference(one)) <= case.limit(one.group)
    }
    assert worse == {}


@every_float32_case
def test_native_passes(case: Case) -> None:
    """Guards the native engine, which decodes on CPUs, as a whole: its experts, states and both
    towers against the official recordings."""
    try:
        model = accelerate(case.model, "native")
    except ValueError as error:
        assert "compile" in str(error)
        pytest.skip(str(error))
    worse = {
        one.key: difference
        for one in recorded.replay(model, case)
        if not (difference := case.difference(one)) <= case.limit(one.group)
    }
    assert worse == {}
    assert wrong(case, model, [run for run in recorded.recorded_runs(case) if run.is_robust]) == []


@every_case
def test_every_recorded_run(case: Case) -> None:
    """Guards decoding as a whole. bfloat16 leaves out runs whose decisions depend on rounding; on a
    processor with AVX2 alone it is one more.
    """
    runs = [run for run in recorded.recorded_runs(case) if run.is_robust]
    assert len(runs) == (40 if case.is_exact else 27)
    different = wrong(case, case.model, runs)
    assert len(different) <= (0 if case.is_exact else 1), different


def test_bfloat16_runs_do_not_depend_on_our_rounding() -> None:
    """Guards against equality by luck: the same weights in float32 choose the same tokens, if the
    time features alone are rounded to bfloat16."""
    (case,) = [case for case in CASES if not case.is_exact]
    runs = [run for run in recorded.recorded_runs(case) if run.is_robust]
    assert wrong(case, case.wide_model, runs) == []


@every_float32_case
@pytest.mark.parametrize("mode", ["ar", "mock_ar", "mask_diffusion"])
def test_text_after_eos_is_dropped(case: Case, mode: str) -> None:
    """Deliberate difference: the recording keeps what follows EOS in its block; ours ends there."""
    entry = case.record["eos"]["p17"][mode]
    (run,) = [run for run in recorded.eos_runs(case) if f" {mode} " in run.name]
    if mode == "mask_diffusion":
        assert len(entry["tokens"]) > len(run.tokens), "the recording has text to drop"
    (ours,) = generate(case.model, [run.prompt], run.options)
    assert (ours.tokens, ours.finish_reason) == (run.tokens, "eos")
    assert ours.nfe == (entry["nfe"] if mode == "mask_diffusion" else ours.nfe)


@every_float32_case
def test_rows_of_a_batch_have_their_own_t(case: Case) -> None:
    """Deliberate difference: the recording averages t over the batch; ours are the rows alone."""
    runs = recorded.batch_runs(case)
    assert len(runs) == 2
    assert wrong(case, case.model, runs) == []
    assert all(case.record["batch2"]["row_differs_from_batch1_run"]), "the averaged t is another"


class Pass(NamedTuple):
    """One denoiser pass as the model saw it."""

    block: list[int]
    t: float
    probs: Tensor  # (T, V) with the mask token excluded


def spy_on_passes(case: Case, model: TwoTower, monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    passes: list[Pass] = []
    original = model.denoise

    def denoise(block: Tensor, view: Any, t: Tensor | None) -> Tensor:
        logits = original(block, view, t)
        assert t is not None
        banned = logits[0].clone()
        banned[:, case.record["mask_token_id"]] = float("-inf")
        passes.append(Pass(block[0].tolist(), float(t[0]), banned.softmax(-1)))
        return logits

    monkeypatch.setattr(model, "denoise", denoise)
    return passes


def trajectories() -> list[tuple[Case, int]]:
    return [(case, n) for case in CASES for n in range(len(case.record["trajectory"]["p17"]))]


@pytest.mark.parametrize(("case", "number"), trajectories(), ids=name)
def test_every_step_of_a_trajectory(
    case: Case, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against right tokens by wrong steps: t, tokens before and after, confidence."""
    recorded_run = case.record["trajectory"]["p17"][number]
    options = recorded.options_of(recorded_run)
    passes = spy_on_passes(case, case.model, monkeypatch)
    events = stream(case.model, [case.record["prompts"]["p17"]], options)
    steps = [event for event in events if isinstance(event, StepTaken)]
    assert len(steps) == len(passes) == len(recorded_run["steps"])
    # bfloat16 logits are multiples of up to 1/16: where two of them round otherwise on another
    # processor, a probability moves by up to 1/4 of 2/16. The printed ones have 6 digits.
    atol = 1e-3 if case.is_exact else 0.032
    for ours, seen, expected in zip(steps, passes, recorded_run["steps"], strict=True):
        assert (ours.block_index, ours.step) == (expected["block"], expected["step"])
        assert ours.t == seen.t == expected["t"]
        assert seen.block == expected["tokens_in"]
        assert ours.tokens == expected["tokens_out"]
        best = torch.tensor(expected["max_conf"])
        torch.testing.assert_close(seen.probs.amax(-1), best, rtol=0, atol=atol)
        was_masked = torch.tensor(seen.block) == case.record["mask_token_id"]
        confidence = torch.tensor(ours.confidence)
        torch.testing.assert_close(confidence[was_masked], best[was_masked], rtol=0, atol=atol)


def test_time_features() -> None:
    """Features of 1000 t. A frequency's last bit differs between processors, and the angle is a
    thousand times that: 6e-5. The recording's float64 version differs by the same rounding.
    """
    ours = time_features(TIMES, torch.float32)
    torch.testing.assert_close(ours, SAMPLER["time/features_dim256"], rtol=0, atol=1e-4)
    exact = SAMPLER["time/features_dim256_float64"].float()
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-4)


def test_time_features_round_t_in_bfloat16() -> None:
    """Guards a fact of the released weights: in bfloat16 0.625 is 624 / 1000, not 625 / 1000."""
    ours = time_features(TIMES, torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, SAMPLER["time/features_dim256_bf16_pipeline"])
    unrounded = time_features(TIMES, torch.float32).bfloat16()
    assert not torch.equal(ours, unrounded)


def test_time_embedder() -> None:
    embedder = TimestepEmbedder(12)
    prefix = "time/embedder/"
    embedder.load_state_dict(
        {key.removeprefix(prefix): v for key, v in SAMPLER.items() if key.startswith(prefix)}
    )
    with torch.no_grad():
        ours = embedder(TIMES)
    # What the features' last bits (6e-5, see above) come to behind two small matrices.
    torch.testing.assert_close(ours, SAMPLER["time/embedder_output"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ["1x4", "2x2", "3x4"])
def test_block_causal_masks(shape: str) -> None:
    num_blocks, block_size = map(int, shape.split("x"))
    expected = SAMPLER[f"block_causal_mask/{shape}/attend"].bool()
    starts = torch.arange(num_blocks).unsqueeze(0) * block_size
    found = masks.block_causal(starts, num_blocks * block_size, block_size)
    assert torch.equal(found[0, 0], expected)


@every_float32_case
def test_a_prompt_of_one_token(case: Case) -> None:
    """Deliberate difference: the official code cannot cache one token; ours decodes from it as if
    it were the end of any prompt."""
    assert case.record["prompt_length_1"]
    prompt = case.record["prompts"]["p1"]
    cache = case.model.prefill(torch.tensor([prompt]))
    recorded_logits = case.tensors["p1/context_logits"][:, -1]
    torch.testing.assert_close(case.model.next_logits(cache), recorded_logits, rtol=0, atol=5e-4)
    for mode in ("ar", "mock-ar", "diffusion"):
        options = GenerateOptions(mode=mode, max_new_tokens=20, ignore_eos=True)
        (completion,) = generate(case.model, [prompt], options)
        assert len(completion.tokens) == 20


def small_copy(folder: Path, tokens: list[int]) -> None:
    """A case with one tensor and one run, whose recorded tokens are `tokens`."""
    source = CASES[2]
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source.folder / name, folder / name)
    kept = {key: v for key, v in source.tensors.items() if key.endswith("p1/context_logits")}
    save_file(kept, folder / "golden.safetensors")
    run = {"prompt": [5, 9], "mode": "ar", "max_new_tokens": 4, "tokens": tokens, "robust": True}
    record = {"dtype": "bfloat16", "mask_token_id": 3, "prompts": source.record["prompts"]}
    record |= {"teacher_forced_inputs": {}, "generate": {}, "extra_generate": [run]}
    (folder / "golden.json").write_text(json.dumps(record))


def test_table_script(tmp_path: Path) -> None:
    """Guards the conformance table: cases anywhere are compared, and a difference is not hidden."""
    script = Path(__file__).parents[2] / "scripts" / "conformance_table.py"
    options = GenerateOptions(mode="ar", max_new_tokens=4, ignore_eos=True)
    (right,) = generate(CASES[2].model, [[5, 9]], options)
    small_copy(tmp_path / "case_98", right.tokens)
    small_copy(tmp_path / "case_99", [1, 1, 1, 1])
    command = [sys.executable, str(script), str(tmp_path)]
    table = subprocess.run(command, capture_output=True, text=True)
    assert table.returncode == 1, table.stderr
    said = table.stderr.splitlines()
    assert [line for line in said if ": golden.safetensors not read; " not in line] == []
    rows = [line.strip("| ").split(" | ") for line in table.stdout.splitlines()[2:]]
    assert [(row[0], row[2], row[-4:]) for row in rows] == [
        ("case_98", "1/1", ["yes", "1", "1", "1"]),
        ("case_99", "1/1", ["yes", "1", "0", "1"]),
    ]
    nothing = subprocess.run([*command[:2], str(tmp_path / "no")], capture_output=True, text=True)
    assert nothing.returncode == 2
    assert "no case folder" in nothing.stderr
