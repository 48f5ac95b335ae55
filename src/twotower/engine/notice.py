"""Whether a prompt is like what the model was trained on."""

from collections.abc import Sequence

import torch

from twotower.model import TwoTower

_BEGINNING = 4  # tokens that show a prompt's form
_MAX_SCORED = 256  # tokens of a prompt that are compared with the training text


@torch.no_grad()
def prompt_notice(model: TwoTower, ids: Sequence[int]) -> str | None:
    """A sentence where the mean surprisal of a prompt, or of its beginning, is above what the
    model's checkpoint names as the most of its training text (most_prompt_nats in
    generation_config.json). None elsewhere. A known sentence in no known form is told by its
    beginning.
    """
    most = model.generation_defaults.get("most_prompt_nats")
    if not isinstance(most, float) or len(ids) < 2 or model.backend.quantization != "none":
        return None
    tokens = torch.tensor([ids[:_MAX_SCORED]])
    hidden = model.extend(model.empty_cache(1), tokens)
    logprobs = model.context_head(hidden)[0, :-1].log_softmax(-1).cpu()
    each = -logprobs.gather(1, tokens[0, 1:, None])
    nats = float(max(each.mean(), each[:_BEGINNING].mean()))
    if not nats > most:  # nor where it is no number, which decoding refuses
        return None
    return (
        f"unlike the model's training text ({nats:.1f} nats a token, its own has at most "
        f"{most:g}), so expect no sensible answer"
    )
