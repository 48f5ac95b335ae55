"""Write docs/figures.md, and the marked blocks of other pages, from benchmarks/results.

A block stands between `<!-- figures: NAME -->` and `<!-- end figures -->`, NAME one of BLOCKS, in
README.md, docs/*.md or the model card. Every record names its processor, date and command.
Usage: python scripts/make_figures.py
"""

import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

import figure_tables as tables  # noqa: E402  (the path above)
import serving_tables as serving  # noqa: E402
import training_tables as training  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "figures.md"
CARD = ROOT / "src" / "twotower" / "assets" / "MODEL_CARD.md"
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end figures -->)", re.DOTALL)
FIELDS = ("processor", "date", "command")


class Record(NamedTuple):
    """One file of results: `kind` is its name without machine and date."""

    file: Path
    kind: str
    recorded: Mapping[str, str]
    data: Mapping[str, Any]


class Kind(NamedTuple):
    """What a kind of record shows."""

    name: str
    title: str
    table: Callable[[Mapping[str, Any]], str]


class Section(NamedTuple):
    title: str
    note: str
    kinds: Sequence[Kind]


def bench_kinds(title: str, table: Callable[[Mapping[str, Any]], str]) -> list[Kind]:
    """The benchmarks that there are, for one table."""
    return [
        Kind("race_1_thread", f"{title}, one thread", table),
        Kind("race_2_threads", f"{title}, two threads", table),
        Kind("race_again_1_thread", f"{title}, one thread, repeated in a slower hour", table),
        Kind("race_again_2_threads", f"{title}, two threads, repeated in a slower hour", table),
    ]


SECTIONS = (
    Section(
        "Quality by category",
        "How much of AR's quality does each mode keep, and at what speed? 200 held-out prompts a "
        "category, greedy, one thread.\nRight answers and passes do not depend on the processor; "
        "`x AR` does: the median speed-up over our own AR\ndecoding in the same engine. Records of "
        "before 2026-11-29 are of earlier weights.",
        [
            Kind("evaluate", "The shipped model's own defaults", tables.quality),
            Kind("evaluate_int8", "The same in int8", tables.quality),
            Kind(
                "evaluate_as_published",
                "Diffusion without verification, confidence threshold 0.95",
                tables.quality,
            ),
        ],
    ),
    Section(
        "Benchmark",
        "How fast is each engine and mode, prompt included, one prompt at a time? "
        "[Method](benchmark.md#method)."
        "\n`shipped` is real text, with its weights of before 2026-11-29; 32M and 160M parameters "
        "a tower are random weights that\nreplay recorded commits.",
        bench_kinds("Texts", tables.texts),
    ),
    Section(
        "Passes",
        "How long does one pass take, after a context of the median prompt's length?",
        bench_kinds("Passes", tables.passes)[:2],
    ),
    Section(
        "Decoding without the prompt",
        "How long does a token take, prefill not counted?",
        bench_kinds("Decoding", tables.decode_only)[:2],
    ),
    Section(
        "Rows and throughput",
        "How does the throughput of one process grow with the batch size?",
        [
            Kind("rows_eager", "Eager backend", tables.rows_table),
            Kind("rows_native", "Native backend", tables.rows_table),
        ],
    ),
    Section(
        "Prefix cache",
        "How long does prefill take if all but the last 24 tokens of a prompt are cached?",
        [Kind("prefix_cache", "Processor seconds", tables.prefix_cache)],
    ),
    Section(
        "Memory",
        "How much memory does decoding take beside the weights, by prompt length and mode?",
        [Kind("decode_memory", "Growth of peak resident memory, eager", tables.decode_memory)],
    ),
    Section(
        "Quantised checkpoints",
        "How much quality do fewer bits cost? 40 prompts a category, without verification, at the "
        "model's default threshold:\ncompare the settings with each other; for the level see "
        "[the full suite](#quality-by-category).",
        [Kind("quantised_quality", "Quality by precision", tables.quantised_quality)],
    ),
    Section(
        "A real model by precision",
        "How much quality do fewer bits cost on a real model? Perplexity of the solutions of "
        "GSM8K's test questions, after the\nquestion in the model's chat template; native passes.",
        [Kind("precision_quality", "Perplexity", tables.precision_quality)],
    ),
    Section(
        "Benchmark on a real model",
        "How fast is each engine on SmolLM2-135M-Instruct? Questions of GSM8K, MT-bench and "
        "HumanEval, four of each, 96 tokens,\nengines in turns, each in its own process with the "
        "same weights. `x best`: over the fastest of the other engines in\nthe same quantisation, "
        "its n-gram drafts included; `speculative` drafts with prompt lookup, n-grams and the "
        "denoiser.",
        [
            Kind("race_smollm2_1_thread", "One thread", tables.contest),
            Kind("race_smollm2_2_threads", "Two threads", tables.contest),
            Kind(
                "race_smollm2_long",
                "Two threads, prompts of 20 to 85 questions (1,400 to 6,000 tokens), 64 written",
                tables.contest,
            ),
        ],
    ),
    Section(
        "Drafts on a real model",
        "How many tokens a cycle and what speed-up do drafts give on SmolLM2-135M-Instruct, on "
        "prompts that its denoiser was not\ntrained on? Greedy, prompt included, one prompt at a "
        "time. `lookup` includes the n-grams of its answers; `auto` takes\nlookup or the "
        "denoiser as well, whichever has the larger expected gain, or no draft.",
        [
            Kind("drafts_always", "Drafts in every cycle, int8", tables.drafts),
            Kind("drafts_always_float32", "Drafts in every cycle, float32", tables.drafts),
            Kind("drafts_int8_1_thread", "Default options, int8, one thread", tables.drafts),
            Kind("drafts_int8_2_threads", "Default options, int8, two threads", tables.drafts),
        ],
    ),
    Section(
        "Parts of a thin denoiser",
        "What does each part contribute? Denoisers of SmolLM2-135M-Instruct, each without one "
        "part, trained on the same blocks;\nthe training is short, so levels are low. Tokens a "
        "cycle are for greedy drafts on held-out answers; the difference to\nall parts is the "
        "mean over these answers, with its 95 % interval (paired bootstrap). The cost of a draft\n"
        "is one int8 pass with its head in AR steps, the smallest of 200.",
        [Kind("denoiser_parts", "One part less", tables.denoiser_parts)],
    ),
    Section(
        "Passes over blocks",
        "How many AR steps of as many rows does a pass over several tokens of each row cost? Head "
        "included, 200 tokens cached,\none thread, int8. Experts: random weights, 1.2 billion, in "
        "the shape of Nemotron-3-Nano, 6 of 64 experts a token.",
        [
            Kind("pass_costs_experts", "Experts", tables.pass_costs),
            Kind("pass_costs_smollm2", "Dense: SmolLM2-135M-Instruct", tables.pass_costs),
        ],
    ),
    Section(
        "Experts in files",
        "Does a model run whose experts do not fit into memory?",
        [Kind("mapped_experts", "A limit of 600 MB", tables.mapped_experts)],
    ),
    Section(
        "Grammars",
        "What does following a grammar cost?",
        [Kind("grammar_costs", "By vocabulary", tables.grammar_costs)],
    ),
    Section(
        "Server throughput",
        "How many tokens a second does a server give to several clients, beside llama.cpp's with "
        "as many slots? SmolLM2-135M-Instruct,\nquestions of GSM8K and MT-bench, greedy, "
        "streamed, 96 tokens an answer; times are medians of what a client waits.",
        [
            Kind("serve_throughput_int8", "int8 and q8_0", serving.serve_throughput),
            Kind("serve_throughput_int4", "int4 and q4_0", serving.serve_throughput),
        ],
    ),
    Section(
        "Server under load",
        "Is a request lost when clients disconnect and the decoding thread is killed?",
        [
            Kind("serve_load", "32 clients, 5 minutes a mode", serving.serve_load),
            Kind("ray_replicas", "Replicas killed and replaced", serving.ray_replicas),
        ],
    ),
    Section(
        "Two hosts",
        "How many bytes go between the towers, and how much time does the latency cost?",
        [Kind("two_hosts", "Three prompts in one batch, eager", serving.two_hosts)],
    ),
    Section(
        "Training",
        "How was the shipped model trained, and do several processes train the same model?",
        [
            Kind("training_runs", "Runs, each continued from the last", training.training_runs),
            Kind("parallel_training", "Largest difference of a loss", training.parallel_training),
        ],
    ),
    Section(
        "Plan validation",
        "How well does [`twotower plan`](plan.md) predict speeds that others measured on the 30B, "
        "and our own?\n\"Off by\" is the factor in either direction; calibrated rows are left out.",
        [Kind("plan_validation", "Predicted and measured", training.plan_validation)],
    ),
    Section(
        "Ablations",
        "What does each part of the method contribute? [Set-up and findings](ablations.md).",
        [
            Kind("ablations_train", "Training", training.ablations(r"(?!sample-).*")),
            Kind("ablations_sample", "Sampling", training.ablations("sample-.*")),
        ],
    ),
)  # fmt: skip


class Block(NamedTuple):
    """A table for other pages: of the newest record of a kind, with a link to its section."""

    kind: str
    section: str
    table: Callable[[Mapping[str, Any]], str]


BLOCKS = {
    "quality": Block("evaluate", "quality-by-category", tables.quality),
    "quality-modes": Block("evaluate", "quality-by-category", tables.quality_modes),
    "quality-line": Block("evaluate", "quality-by-category", tables.quality_line),
    "benchmark": Block("race_1_thread", "benchmark", tables.bench_short),
    "benchmark-smollm2": Block(
        "race_smollm2_2_threads", "benchmark-on-a-real-model", tables.contest_short
    ),
    "training-runs": Block("training_runs", "training", training.training_runs),
}


def read_records() -> list[Record]:
    """Every record, of the ablations the first of each kind; ValueError for one without machine."""
    records = [read_record(file) for file in sorted(RESULTS.glob("*.json"))]
    for kind in ("train", "sample"):
        found = [
            read_record(file) for file in sorted((RESULTS / "ablations").glob(f"{kind}-*.json"))
        ]
        records.append(found[0]._replace(kind=f"ablations_{kind}"))
    return records


def read_record(file: Path) -> Record:
    data = json.loads(file.read_text(encoding="utf-8"))
    recorded = data.get("recorded", {})
    if missing := [name for name in FIELDS if not recorded.get(name)]:
        raise ValueError(
            f"{file.name}: recorded must name {', '.join(missing)}; measure it again, or add them "
            "as twotower.cli.machine.recorded gives them on the machine that measured it"
        )
    return Record(file, re.sub(r"_cpu_[\d-]+$", "", file.stem), recorded, data)


def newest(records: Sequence[Record], kind: str) -> tuple[list[Record], list[Record]]:
    """Of a kind the newest record of each processor, newest first, and the older ones."""
    own = sorted((r for r in records if r.kind == kind), key=lambda r: r.recorded["date"])[::-1]
    kept = list({r.recorded["processor"]: r for r in reversed(own)}.values())
    kept.sort(key=own.index)
    return kept, [record for record in own if record not in kept]


def make_page(records: Sequence[Record]) -> str:
    """docs/figures.md; ValueError for a record that no section shows."""
    kinds = {kind.name for section in SECTIONS for kind in section.kinds}
    if unknown := [record.file.name for record in records if record.kind not in kinds]:
        raise ValueError(f"{unknown[0]}: no section shows it; add its kind to SECTIONS")
    parts = [
        "# Figures",
        "Look up what was measured, on which machine and by which command. "
        "`python scripts/make_figures.py` writes this page\nfrom the "
        "[records](../benchmarks/results); do not edit it. Commands are those of the day: an "
        "option\nmay have another name since.",
        "\n".join(f"- [{s.title}](#{s.title.lower().replace(' ', '-')})" for s in SECTIONS),
    ]
    return "\n\n".join([*parts, *(make_section(one, records) for one in SECTIONS)]) + "\n"


def make_section(section: Section, records: Sequence[Record]) -> str:
    parts = [f"## {section.title}", section.note]
    older: list[Record] = []
    for kind in section.kinds:
        kept, rest = newest(records, kind.name)
        older += rest
        for record in kept:
            parts += [f"### {kind.title}: {record.recorded['processor']}", source(record)]
            parts.append(kind.table(record.data))
    if older:
        links = ", ".join(f"{link(r, PAGE)} ({r.recorded['processor']})" for r in older)
        parts.append(f"Older: {links}.")
    return "\n\n".join(parts)


def source(record: Record) -> str:
    """Date, record and command of a table."""
    lines = textwrap.wrap(
        record.recorded["command"], 110, break_long_words=False, break_on_hyphens=False
    )
    command = " \\\n        ".join(lines)
    return f"{record.recorded['date']}, {link(record, PAGE)}:\n\n    {command}"


def link(record: Record, page: Path) -> str:
    target = os.path.relpath(record.file, page.parent)
    return f"[{record.file.stem}]({Path(target).as_posix()})"


def fill_blocks(text: str, page: Path, records: Sequence[Record]) -> str:
    """The text of a page with its marked blocks made anew; ValueError for a wrong mark."""
    begins, ends = text.count("<!-- figures: "), text.count("<!-- end figures -->")
    if begins != ends:
        raise ValueError(f"{page.name}: {begins} blocks of figures begin, {ends} end")

    def replace(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(
                f"{page.name}: figures: {match[2]!r} is unknown; use {', '.join(BLOCKS)}"
            )
        block = BLOCKS[match[2]]
        record = newest(records, block.kind)[0][0]
        target = Path(os.path.relpath(PAGE, page.parent)).as_posix()
        where = f"[command and record]({target}#{block.section})"
        if page == CARD:  # which is also read where there is no docs/
            where = f"command and record: docs/figures.md of the source, {block.section}"
        caption = f"{record.recorded['processor']}, {record.recorded['date']};\n{where}."
        return f"{match[1]}\n{block.table(record.data)}\n\n{caption}\n\n{match[3]}"

    return BLOCK.sub(replace, text)


def pages() -> Iterator[Path]:
    """Where marked blocks may stand."""
    yield from (ROOT / "README.md", CARD)
    yield from sorted(set((ROOT / "docs").glob("*.md")) - {PAGE})


def outputs() -> dict[Path, str]:
    """Every file that the script writes, with its text."""
    records = read_records()
    found = {PAGE: make_page(records)}
    for page in pages():
        found[page] = fill_blocks(page.read_text(encoding="utf-8"), page, records)
    return found


def main() -> int:
    try:
        written = outputs()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for page, text in written.items():
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
