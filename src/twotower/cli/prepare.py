"""`twotower prepare`: text in, tokenizer and token shard out, with a progress bar."""

import time
from collections.abc import Iterator, Mapping

from twotower.cli.progress import progress_bar
from twotower.lab.corpus import CATEGORIES, DEFAULT_WEIGHTS, documents
from twotower.train.prepare import PrepareOptions, PrepareProgress, prepare
from twotower.train.readers import Text
from twotower.train.sources import Corpus


def _built_in(seed: int, weights: Mapping[str, float]) -> Iterator[Text]:
    return (
        (document.prompt, document.completion)
        for document in documents("train", seed, weights or None)
    )


BUILT_IN = Corpus(
    categories=tuple({**dict.fromkeys(CATEGORIES), **DEFAULT_WEIGHTS}), documents=_built_in
)


def run(options: PrepareOptions) -> int:
    """Prepare the shard; returns the exit status. Errors of the user arrive as ValueError."""
    record = PrepareProgress(stage="tokenizer", tokens=0, documents=0, sources={})
    began: float | None = None
    with progress_bar("speed") as progress:
        # Without a limit nobody knows how many tokens there will be: the bar only moves.
        task = progress.add_task(record.stage, total=options.limit, speed="")
        for record in prepare(options, BUILT_IN):
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
    text = f"{options.output}: {record.tokens} tokens in {record.documents} documents"
    return f"{text} ({', '.join(shares)})" if len(shares) > 1 else text
