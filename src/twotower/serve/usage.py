"""What a request has cost, as `usage` of OpenAI with our counts beside."""

from collections.abc import Sequence

from twotower.engine import Completion
from twotower.serve.job import Job


def usage_of(job: Job, completions: Sequence[Completion]) -> dict[str, object]:
    """Counts over all rows; prompts count once, however many choices were asked for."""
    num_prompt = sum(map(len, job.prompts))
    num_new = sum(len(completion.tokens) for completion in completions)
    nfe = sum(completion.nfe for completion in completions)
    # With n choices, the later ones may find the first one's prompt in the cache.
    cached = [
        min(c.cached_tokens for c in completions[at : at + job.num_choices])
        for at in range(0, len(completions), job.num_choices)
    ]
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": sum(cached)},
        "nfe": nfe,
        "context_forwards": sum(completion.context_forwards for completion in completions),
        "tokens_per_nfe": round(num_new / nfe, 3) if nfe else None,
    }
