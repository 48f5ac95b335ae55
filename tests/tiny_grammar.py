"""What a grammar accepts, asked token by token."""

from tiny_models import MASK
from tiny_text import byte_tokenizer
from twotower.engine.grammar import Grammar, GrammarFailed
from twotower.engine.grammar_state import TokenRules, begin


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether a text may be written and end there."""
    tokenizer = byte_tokenizer()
    rules = TokenRules(eos=(2,), mask_token_id=MASK, vocab_size=tokenizer.vocab_size)
    state = begin(grammar, tokenizer, rules)
    try:
        state.follow(tokenizer.encode(text))
        return bool(state.mask()[2])
    except GrammarFailed:
        return False
