"""Recorded outputs (tests/golden), and our replay of them.

Knows the layout of a case folder, which of our calls yields each recorded tensor, and how far two
results may lie apart. case_*: of the official implementation; ours/dense_*: of our eager backend,
for backends that run no experts (scripts/record_dense_cases.py).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from twotower import ContextCache, GenerateOptions, TwoTower
from twotower.checkpoint import load_checkpoint
from twotower.engine import MODES
from twotower.engine.resolved import FIELD_MODES
from twotower.layers.adaln import TimestepEmbedder, time_features
from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState

GOLDEN = Path(__file__).parent / "golden"
GROUPS = ("context logits", "KV", "conv state", "SSM state", "mock-AR logits", "denoiser logits")
# The recording itself lies up to 8e-4 from float64 in the denoiser, 1e-5 elsewhere.
TOLERANCE = dict.fromkeys(GROUPS, 5e-4) | {"denoiser logits": 3e-3}
MAX_RMS_RATIO = 2.5  # bfloat16: our error against float64 over the official code's error
_MODES = {"mock_ar": "mock-ar", "mask_diffusion": "diffusion"}
_BLOCK_OPTIONS = ("block_size", "steps_per_block", "confidence_threshold")


class Replayed(NamedTuple):
    """One recorded tensor and our version of it."""

    group: str
    key: str
    ours: Tensor


@dataclass(frozen=True)
class Run:
    """One recorded generation: nfe is None where the recording has none (AR modes)."""

    name: str
    prompt: list[int]
    options: GenerateOptions
    tokens: list[int]
    nfe: int | None
    is_robust: bool


@dataclass(frozen=True)
class Case:
    """One recorded checkpoint."""

    folder: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "golden.json").read_text())
        return found

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "golden.safetensors")

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.record["dtype"])
        return dtype

    @property
    def is_exact(self) -> bool:
        """Whether tensors are compared by absolute difference, all tokens and NFE for equality."""
        return self.dtype == torch.float32

    @property
    def keys(self) -> set[str]:
        """All recorded tensors but the float64 evaluations."""
        return {key for key in self.tensors if not key.startswith("exact/")}

    @cached_property
    def model(self) -> TwoTower:
        return load_checkpoint(self.folder, dtype=self.dtype)

    @cached_property
    def wide_model(self) -> TwoTower:
        """The same weights with float32 arithmetic, but time features rounded as recorded."""
        model = load_checkpoint(self.folder, dtype=torch.float32)
        model.t_embedder = _RoundedTime(model.t_embedder, self.dtype)
        return model

    def difference(self, found: Replayed) -> float:
        """float32: largest absolute difference. bfloat16: our RMS error over the recorded one."""
        ours, recorded = found.ours, self.tensors[found.key]
        if found.group == "conv state":
            # Theirs is W wide; its oldest column is no input of any later token. Ours has W-1.
            recorded = recorded[..., -ours.shape[-1] :]
        assert ours.shape == recorded.shape, found.key
        if self.is_exact:
            return float((ours - recorded).detach().abs().max())
        exact = self.tensors[f"exact/{found.key}"][..., -ours.shape[-1] :]
        # The floor is far below bfloat16's resolution; a few small states are recorded exactly.
        return float(rms(ours.float() - exact) / max(rms(recorded.float() - exact), 1e-6))

    def limit(self, group: str) -> float:
        return TOLERANCE[group] if self.is_exact else MAX_RMS_RATIO


class _RoundedTime(nn.Module):
    """A time embedder whose features are rounded to another dtype first."""

    def __init__(self, embedder: TimestepEmbedder, dtype: torch.dtype) -> None:
        super().__init__()
        self.mlp = embedder.mlp
        self.dtype = dtype

    def forward(self, t: Tensor) -> Tensor:
        embedding: Tensor = self.mlp(time_features(t, self.dtype).to(self.mlp[0].weight.dtype))
        return embedding


def rms(x: Tensor) -> float:
    """Root of the mean square."""
    return float(x.detach().double().square().mean().sqrt())


def read_cases(parent: Path = GOLDEN, pattern: str = "case_*") -> list[Case]:
    return [Case(folder) for folder in sorted(parent.glob(pattern))]


def replay(model: TwoTower, case: Case) -> Iterator[Replayed]:
    """Every recorded tensor of the case, computed by us."""
    return (found for found in replay_record(model, case.record) if found.key in case.keys)


def replay_record(model: TwoTower, record: dict[str, Any]) -> Iterator[Replayed]:
    """Every tensor that a record of prompts and inputs asks for."""
    for name, prompt in record["prompts"].items():
        inputs = record["teacher_forced_inputs"].get(name)
        yield from _replay_prompt(model, inputs, name, torch.tensor([prompt]))


def _replay_prompt(
    model: TwoTower, inputs: dict[str, Any] | None, name: str, ids: Tensor
) -> Iterator[Replayed]:
    yield Replayed("context logits", f"{name}/context_logits", model.context_logits(ids))
    if inputs is None:
        return  # p1: the official code cannot cache one token
    cache = model.prefill(ids)
    yield Replayed("context logits", f"{name}/prefill/last_logits", model.next_logits(cache))
    yield from _states(f"{name}/prefill", cache)
    yield from _denoised(model, f"{name}/denoise", cache, inputs)
    yield Replayed("mock-AR logits", f"{name}/mock_ar/step0_logits", mock_ar(model, ids))
    for extension in ("extend16", "extend2"):
        grown = model.prefill(ids)
        model.extend(grown, torch.tensor([inputs[f"{extension}_tokens"]]))
        yield from _states(f"{name}/{extension}", grown)
        yield from _denoised(model, f"{name}/{extension}/denoise", grown, inputs)
    for token in inputs["extend3_single_tokens"]:
        model.extend(cache, torch.tensor([[token]]))
    stem = f"{name}/extend3_single"
    yield from _states(stem, cache)
    yield Replayed("context logits", f"{stem}/last_logits", model.next_logits(cache))
    longer = torch.cat([ids, torch.tensor([inputs["extend3_single_tokens"]])], dim=1)
    key = f"{name}/mock_ar/after_extend3_logits"
    yield Replayed("mock-AR logits", key, mock_ar(model, longer))


def mock_ar(model: TwoTower, ids: Tensor) -> Tensor:
    """Denoiser logits of the last token alone, without t, after the cache of the others: (B, V)."""
    return model.denoise(ids[:, -1:], model.prefill(ids[:, :-1]).view(), None)[:, 0]


def _denoised(
    model: TwoTower, stem: str, cache: ContextCache, inputs: dict[str, Any]
) -> Iterator[Replayed]:
    for name, block in inputs["denoise"].items():
        t = None if block["t"] is None else torch.tensor([block["t"]])
        logits = model.denoise(torch.tensor([block["tokens"]]), cache.view(), t)
        yield Replayed("denoiser logits", f"{stem}/{name}", logits)


def _states(stem: str, cache: ContextCache) -> Iterator[Replayed]:
    for index, state in enumerate(cache.layers):
        prefix = f"{stem}/layer{index}"
        if isinstance(state, KV):
            yield Replayed("KV", f"{prefix}/key", state.k.transpose(1, 2))
            yield Replayed("KV", f"{prefix}/value", state.v.transpose(1, 2))
        elif isinstance(state, MambaState):
            yield Replayed("conv state", f"{prefix}/conv_state", state.conv)
            yield Replayed("SSM state", f"{prefix}/ssm_state", state.ssm)


def recorded_runs(case: Case) -> list[Run]:
    """Every recorded generation of a single prompt without EOS."""
    runs = []
    for name, modes in case.record["generate"].items():
        prompt = case.record["prompts"][name]
        for mode in ("ar", "mock_ar"):
            runs.append(_run(f"{name} {mode}", mode, prompt, modes[mode]))
        for number, entry in enumerate(modes["mask_diffusion"]):
            runs.append(_run(f"{name} diffusion {number}", "mask_diffusion", prompt, entry))
    for entry in case.record.get("extra_generate", []):
        runs.append(_run("extra", entry["mode"], entry["prompt"], entry))
    return runs


def eos_runs(case: Case) -> list[Run]:
    """The recorded runs with EOS; expected is the recording up to the EOS (ours drops the rest)."""
    runs = []
    for name, modes in case.record.get("eos", {}).items():
        for mode, entry in modes.items():
            end = entry["tokens"].index(entry["eos_token_id"]) + 1
            cut = {**entry, "tokens": entry["tokens"][:end]}
            runs.append(_run(f"{name} {mode} eos", mode, case.record["prompts"][name], cut))
    return runs


def batch_runs(case: Case) -> list[Run]:
    """The prompts of `batch2`; expected is what each gives alone, as our rows have their own t."""
    batch = case.record.get("batch2")
    if not batch:
        return []
    alone = zip(batch["prompts"], batch["per_row_single_tokens"], strict=True)
    return [
        _run(f"batch2 row {row}", "mask_diffusion", prompt, {**batch, "tokens": tokens, "nfe": nfe})
        for row, ((prompt, tokens), nfe) in enumerate(
            zip(alone, batch["per_row_single_nfe"], strict=True)
        )
    ]


def _run(name: str, mode: str, prompt: list[int], entry: dict[str, Any]) -> Run:
    return Run(
        name=name,
        prompt=prompt,
        options=options_of(entry, mode),
        tokens=entry["tokens"],
        nfe=entry.get("nfe"),
        is_robust=entry.get("robust", True),
    )


def options_of(entry: dict[str, Any], mode: str = "mask_diffusion") -> GenerateOptions:
    """Our options for a recorded entry; the recorded length is 32 tokens where it names none."""
    mode = _MODES.get(mode, mode)
    used = {n: entry[n] for n in _BLOCK_OPTIONS if n in entry and mode in FIELD_MODES.get(n, MODES)}
    return GenerateOptions(
        mode=mode,  # type: ignore[arg-type]
        max_new_tokens=entry.get("max_new_tokens", 32),
        eos_token_id=entry.get("eos_token_id"),
        ignore_eos=entry.get("eos_token_id") is None,
        **used,
    )
