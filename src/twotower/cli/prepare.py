"""`twotower prepare`: text in, tokenizer and token shard out, with a progress bar."""

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from twotower.train.prepare import PrepareProgress, prepare
from twotower.train.prepare_options import PrepareOptions


def run(options: PrepareOptions) -> int:
    """Prepare the shard; returns the exit status. Errors of the user arrive as ValueError."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    record = PrepareProgress(stage="tokenizer", tokens=0, documents=0, sources={})
    began: float | None = None
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        # Without a limit nobody knows how many tokens there will be: the bar only moves.
        task = progress.add_task(record.stage, total=options.limit, speed="")
        for record in prepare(options):
            began = began or (time.monotonic() if record.stage == "tokens" else None)
            progress.update(
                task,
                description=record.stage,
                completed=min(record.tokens, options.limit or record.tokens),
                speed=speed_text(record.tokens, began),
            )
    print(summary(options, record))
    return 0


def speed_text(tokens: int, began: float | None) -> str:
    """Tokens per second since `began`, e.g. "310.5k tok/s"; nothing before there is a rate."""
    elapsed = 0.0 if began is None else time.monotonic() - began
    return f"{tokens / elapsed / 1000:.1f}k tok/s" if elapsed > 0 else ""


def summary(options: PrepareOptions, record: PrepareProgress) -> str:
    """What was written, with the share of each source if there are several."""
    shares = [f"{name} {tokens / record.tokens:.1%}" for name, tokens in record.sources.items()]
    text = f"{options.out}: {record.tokens} tokens in {record.documents} documents"
    return f"{text} ({', '.join(shares)})" if len(shares) > 1 else text


if __name__ == "__main__":
    import tyro

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    try:
        sys.exit(run(tyro.cli(PrepareOptions)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
