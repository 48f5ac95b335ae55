"""Print the tables of README, model card and notes from an evaluation's results.json, as Markdown.

Usage: python scripts/evaluation_table.py results.json [MODE]
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEAD = (
    "| category | AR | {mode} | kept | 95 % | tokens/NFE | NFE "
    "| AR tokens/s | {mode} tokens/s | ratio |"
)


def main(file: str, mode: str = "diffusion") -> None:
    results = json.loads(Path(file).read_text(encoding="utf-8"))
    print(HEAD.format(mode=mode))
    print("|---" * HEAD.count(" | ") + "|---|")
    for category, measured in {**results["categories"], "all": results["modes"]}.items():
        print(row(category, measured["ar"], measured[mode]))


def row(category: str, ar: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """One line: answers right, what is kept of AR's, what it cost."""
    low, high = ours["retention_interval"]
    cells = [
        category,
        f"{ar['correct']}/{ar['n']}",
        f"{ours['correct']}/{ours['n']}",
        f"{100 * ours['retention']:.1f} %",
        f"{100 * low:.1f}-{100 * high:.1f}",
        "-" if ours["tokens_per_nfe"] is None else f"{ours['tokens_per_nfe']:.2f}",
        str(ours["nfe"]),
        f"{ar['tokens_per_s']:.0f}",
        f"{ours['tokens_per_s']:.0f}",
        f"{ours['speed_ratio']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(*sys.argv[1:])
