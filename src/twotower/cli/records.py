"""A completion as JSON."""

import dataclasses

from twotower.engine import Completion


def completion_record(completion: Completion) -> dict[str, object]:
    """What was written and what it cost; how probable each token is, where that was asked."""
    record: dict[str, object] = {
        "text": completion.text,
        "tokens": completion.tokens,
        "nfe": completion.nfe,
        "context_forwards": completion.context_forwards,
        "lookup_tokens": completion.lookup_tokens,
        "denoiser_tokens": completion.denoiser_tokens,
        "finish_reason": completion.finish_reason,
    }
    if completion.logprobs is not None:
        record["logprobs"] = [dataclasses.asdict(one) for one in completion.logprobs]
    return record
