"""Does a GPU reproduce recorded tensors and texts, and do its kernels agree with float64?

Cases of the official implementation and of our own eager backend (tests/golden), by eager and by
recorded passes (CUDA graphs). What a backend refuses is noted with its reason. Exit status 1 where
a tensor is beyond its limit, or a text in float32 differs.

    PYTHONPATH=src python scripts/gpu/conformance.py
"""

import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from picture import Record
from stage import Stage, reason_of
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import recorded  # noqa: E402
import slow_kernels  # noqa: E402
from recorded import GOLDEN, Case  # noqa: E402
from twotower import TwoTower, accelerate, generate, masks  # noqa: E402
from twotower.cli.scripts import script_parser  # noqa: E402
from twotower.kernels import expert_products, ops  # noqa: E402
from twotower.lab.report import COLORS, new_figure  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REHEARSED = 3  # tensors and texts of each case


def check_kernels(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """What only a GPU chooses, against slow code: name, largest difference, limit."""
    generator = torch.Generator().manual_seed(0)
    half = torch.bfloat16

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(3, 4, 8, 64), draw(3, 40, 2, 64), draw(3, 40, 2, 64)
    mask = masks.causal_rows(4, torch.tensor([36, 5, 0]), 36)
    expected = slow_kernels.attention(q, k, v, mask)
    for dtype, limit in ((torch.float32, 1e-4), (half, 0.05)):
        moved = (part.to(device, dtype) for part in (q, k, v))
        found = ops.attention_by_groups(*moved, mask.to(device)).double().cpu()
        yield f"attention by groups, {dtype}", float((found - expected).abs().max()), limit
    experts = torch.tensor([0, 0, 2, 2, 2, 5]).to(device)
    x, up, down = draw(6, 64), draw(6, 96, 64) / 8, draw(6, 64, 96) / 10
    full = [
        down[e] @ (up[e] @ row).clamp(min=0).square()
        for e, row in zip(experts.tolist(), x, strict=True)
    ]
    found = expert_products.grouped_products(
        *(part.to(device, half) for part in (x, up, down)), experts
    )
    difference = (found.double().cpu() - torch.stack(full)).abs().max()
    yield (
        "grouped products, bfloat16",
        float(difference),
        0.05 * float(torch.stack(full).abs().max()),
    )


def check_tensors(case: Case, model: TwoTower, most: int | None) -> dict[str, object]:
    """The largest difference of each group of tensors, over its limit."""
    worst: dict[str, float] = {}
    for one in islice(recorded.replay(model, case), most):
        on_host = one._replace(ours=one.ours.cpu())
        share = case.difference(on_host) / case.limit(one.group)
        worst[one.group] = max(worst.get(one.group, 0.0), round(share, 4))
    return {"of_limit": worst, "is_right": all(share <= 1 for share in worst.values())}


def check_texts(case: Case, model: TwoTower, most: int | None) -> dict[str, object]:
    """How many of the recorded texts come out."""
    runs = [run for run in recorded.recorded_runs(case) if run.is_robust][:most]
    found = [generate(model, [run.prompt], run.options)[0] for run in runs]
    equal = sum(one.tokens == run.tokens for one, run in zip(found, runs, strict=True))
    # In bfloat16 another order of a sum may choose another token.
    return {"texts": len(runs), "equal": equal, "is_right": equal == len(runs) or not case.is_exact}


def worst_of_limit(record: Record) -> dict[str, dict[str, float]]:
    """By what was run, by group: the largest difference of all cases, over its limit."""
    found: dict[str, dict[str, float]] = {}
    for one in record["results"]:
        shares = one.get("of_limit", {})
        if "limit" in one:
            shares = {one["what"]: one["difference"] / one["limit"]}
        own = found.setdefault(one.get("backend", "kernel alone"), {})
        for group, share in shares.items():
            own[group] = max(own.get(group, 0.0), share)
    return found


def paint(record: Record) -> "Figure":
    """A bar for each group and backend up to the limit, and how many texts are equal."""
    found = worst_of_limit(record)
    groups = list(dict.fromkeys(group for own in found.values() for group in own))
    texts, equal = (sum(one.get(key, 0) for one in record["results"]) for key in ("texts", "equal"))
    figure = new_figure(9, 2 + 0.36 * len(groups))
    wrong = sum(not one.get("is_right", True) for one in record["results"])
    figure.suptitle(
        f"Conformance: {wrong} of {len(record['results'])} results wrong; "
        f"{equal} of {texts} texts equal (in bfloat16 they may differ)"
    )
    axes = figure.subplots()
    for number, (name, own) in enumerate(found.items()):
        shift = 0.0 if name == "kernel alone" else 0.4 * (number - 1.5)
        places = [groups.index(group) + shift for group in own]
        axes.barh(places, list(own.values()), 0.38, label=name, color=COLORS[number])
    axes.axvline(1, color="black", linewidth=1.5, label="limit")
    axes.set_xscale("log")
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.set_xlabel("largest difference of all cases / its limit (no unit)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def main() -> int:
    parser = script_parser(__doc__)
    stage = Stage("conformance", parser, paint)
    for name, difference, limit in check_kernels(stage.device):
        if not stage.has(what=name):
            stage.add(what=name, difference=difference, limit=limit, is_right=difference <= limit)
    cases = [*recorded.read_cases(GOLDEN / "ours", "dense_*"), *recorded.read_cases()]
    most = REHEARSED if stage.is_rehearsal else None
    checks: tuple[Callable[[Case, TwoTower, int | None], dict[str, object]], ...]
    checks = (check_tensors, check_texts)
    for case in cases:
        for backend in ("eager", "graphs"):
            for check in checks:
                values = {"case": case.folder.name, "backend": backend, "what": check.__name__}
                if stage.is_over or stage.has(**values):
                    continue
                try:
                    model = accelerate(case.model.to(stage.device), backend)
                    stage.add(**values, **check(case, model, most))
                except ValueError as error:
                    stage.add(**values, refused=reason_of(error))
    stage.close()
    wrong = [one for one in stage.results if not one.get("is_right", True)]
    print(f"{len(stage.results)} results, {len(wrong)} wrong: {stage.args.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
