"""mode="mock-ar": the denoiser chooses token by token, a check of it without diffusion.

It reads each row's last token, which the cache does not hold yet. Source: system.md section 4.
"""

import torch

from twotower.engine import blocks
from twotower.engine.batch import Batch, DecodingMode, Draft
from twotower.engine.logits import choose_tokens


def draft(batch: Batch) -> None:
    """The denoiser's choice after each row's last token, without t."""
    last = torch.tensor([[(row.tokens or row.prompt)[-1]] for row in batch.rows])
    logits = batch.model.denoise(last, batch.cache.view(), None)
    for row in batch.rows:
        row.nfe += 1
    chosen, ids = choose_tokens(batch.rows, logits, batch.sampler), batch.model.draft_ids
    batch.drafts = [Draft(own) for own in (chosen if ids is None else ids[chosen]).tolist()]


MOCK_AR = DecodingMode(choose=blocks.choose, draft=draft, num_unread=1)
