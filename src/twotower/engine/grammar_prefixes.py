"""Where the probability of a token goes that a grammar forbids.

Grammars are about characters, and tokens hold several: `",` closes a text and begins another key.
Where no other key may come, a model that is sure that the text is over would otherwise go on with
whatever else is possible inside it. So what a forbidden token was worth goes to the longest token
that it begins with and that is allowed, but for white space: here to `"`. Likewise in JSON, a comma
or bracket that is forbidden says that the value is over, and goes to the one that may follow it:
otherwise a number would grow another digit.
"""

from functools import lru_cache

import torch
from torch import Tensor

from twotower.tokenizer import Tokenizer

_MAX_FORBIDDEN = 512  # forbidden tokens that count, the most probable ones
_MIN_SHARE = 1e-6  # and the probability of one that does
_AFTER_VALUES = b",}]"


class TokenPrefixes:
    """The tokens of a vocabulary that others begin with."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        left_out = tokenizer.special_ids | tokenizer.missing_ids
        usual = [token for token in range(tokenizer.vocab_size) if token not in left_out]
        spelt = {token: tokenizer.token_bytes(token) for token in usual}
        # A space says nothing of what was meant: most words begin with one.
        known = {data: token for token, data in reversed(spelt.items()) if data.strip()}
        self._longest = {
            token: next((known[one] for one in _beginnings(data) if one in known), None)
            for token, data in spelt.items()
        }
        # A vocabulary of bytes has each of them.
        self._after_values = [known[bytes([b])] for b in _AFTER_VALUES if bytes([b]) in known]
        self._ends_value = {t for t, data in spelt.items() if data and data[0] in _AFTER_VALUES}

    def pass_on(self, logits: Tensor, allowed: Tensor, is_json: bool = False) -> Tensor:
        """Logits (V,) in which the allowed tokens, (V,) bool, have what forbidden ones were worth
        that begin with them; those that nothing comes to keep theirs to the bit.
        """
        after_value = next((t for t in self._after_values if is_json and allowed[t]), None)
        largest = logits.max()
        weights = (logits - largest).float().cpu().double().exp()
        lost = weights.masked_fill(allowed, 0.0).topk(min(_MAX_FORBIDDEN, len(weights)))
        count = int((lost.values > _MIN_SHARE * weights.sum()).sum())
        gained: dict[int, float] = {}
        for token in lost.indices[:count].tolist():
            heir = self._longest.get(token)
            while heir is not None and not allowed[heir]:
                heir = self._longest[heir]
            if heir is None and token in self._ends_value:
                heir = after_value
            if heir is not None:
                gained[heir] = gained.get(heir, 0.0) + float(weights[token])
        if not gained:
            return logits
        heirs = torch.tensor(list(gained))
        sums = weights[heirs] + torch.tensor(list(gained.values()), dtype=torch.float64)
        values = sums.log().to(logits.device, logits.dtype) + largest
        return logits.index_copy(0, heirs.to(logits.device), values)


def _beginnings(data: bytes) -> list[bytes]:
    """Shorter ones, the longest first."""
    return [data[:length] for length in range(len(data) - 1, 0, -1)]


@lru_cache(maxsize=8)
def prefixes_of(tokenizer: Tokenizer) -> TokenPrefixes:
    """Those of a tokenizer, worked out once."""
    return TokenPrefixes(tokenizer)
