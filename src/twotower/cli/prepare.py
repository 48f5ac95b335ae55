"""`twotower prepare`: text in, tokenizer and token shard out, with a progress bar."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from twotower.train.prepare import PrepareOptions, prepare


def run(options: PrepareOptions) -> int:
    """Prepare the shard; returns the exit status. Errors of the user arrive as ValueError."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    documents = tokens = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("tokenizer", total=options.tokens)
        for record in prepare(options):
            documents, tokens = record.documents, record.tokens
            progress.update(task, description=record.stage, completed=min(tokens, options.tokens))
    print(f"{options.out}: {tokens} tokens in {documents} documents")
    return 0


if __name__ == "__main__":
    import tyro

    try:
        sys.exit(run(tyro.cli(PrepareOptions)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
