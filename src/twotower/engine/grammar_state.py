"""Where a row's text is in its grammar: which tokens may follow, and whether it may end here.

Following a text may take any time and memory as well, so each row has a process of its own for it,
a copy of that which holds the grammar. It ends the row that it fails, and nothing else.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twotower.engine import grammar_child as child
from twotower.engine.fork_server import Process, ProcessDied
from twotower.engine.grammar import Grammar, GrammarFailed, one_line
from twotower.engine.grammar_builder import Built, build
from twotower.engine.grammar_prefixes import prefixes_of
from twotower.tokenizer import Tokenizer

_FORBIDDEN = "doesn't satisfy the grammar"  # in the library's words
_ANSWER_S = 10.0  # on a machine that is busy with other things
_ROW_CPU_S = 0.1  # for a row, and for each of its masks:
_MASK_CPU_S, _MASK_CPU_S_PER_TOKEN = 0.5e-3, 20e-9  # the second times the size of the vocabulary


@dataclass(frozen=True)
class TokenRules:
    """What is true of tokens under any grammar."""

    eos: tuple[int, ...]  # end a text, where the grammar lets it end
    mask_token_id: int  # never text
    vocab_size: int  # of the model


class _Answer:
    """What a process says to one question, once it has come."""

    def __init__(self, reply: bytes | None = None) -> None:
        self.reply = reply
        self.error: GrammarFailed | None = None


class _RowProcess:
    """A row's own copy of a grammar's process. It answers in the order of the questions; what it
    may take grows with the masks that it is asked for.
    """

    def __init__(self, process: Process, vocab_size: int) -> None:
        self._process = process
        self._mask_cpu_s = _MASK_CPU_S + _MASK_CPU_S_PER_TOKEN * vocab_size
        self._left_s = _ROW_CPU_S  # of CPU time, if it had taken none
        self._spent_s = 0.0
        self._pending: deque[_Answer] = deque()

    def ask(self, question: bytes, tokens: Sequence[int], num_masks: int) -> _Answer:
        """Let it work on an answer, for which others need not wait."""
        self._left_s += self._mask_cpu_s * num_masks
        cpu_s = max(self._left_s - self._spent_s, 1e-3)
        self._process.send(question + child.numbers(tokens), cpu_s, _ANSWER_S)
        self._pending.append(_Answer())
        return self._pending[-1]

    def wait_for(self, answer: _Answer) -> bytes:
        """The answer, when it has come. GrammarFailed."""
        while answer.reply is None and answer.error is None:
            self._receive(self._pending.popleft())
        if answer.error is not None:
            raise answer.error
        assert answer.reply is not None
        return answer.reply

    def _receive(self, first: _Answer) -> None:
        try:
            first.reply, self._spent_s = self._process.receive()
        except ProcessDied:
            first.error = GrammarFailed(
                "grammar: following it takes more time or memory than it may; give a simpler one",
                is_of_grammar=True,
            )
        except ValueError as error:
            message = one_line(str(error))
            is_ours = _FORBIDDEN in message  # we gave it a token that it forbids
            first.error = GrammarFailed(f"grammar: {message}", not is_ours)


class GrammarState:
    """Where one row's text is in its grammar; cheap to take back, so drafts may be tried.

    What can come next is worked out in a process of the row's own. `follow` and `look_ahead` only
    ask it: whoever calls them early has the answers when they are needed.
    """

    def __init__(
        self, built: Built, rules: TokenRules, tokenizer: Tokenizer, is_json: bool = False
    ) -> None:
        self._built = built
        self._rules = rules
        self._prefixes, self._is_json = prefixes_of(tokenizer), is_json
        # A model may have more tokens than its tokenizer; the library must not be asked for those.
        unused = tokenizer.unused_ids(rules.vocab_size)
        special = {*tokenizer.special_ids, *unused, rules.mask_token_id}
        self._banned = frozenset(special - set(rules.eos))
        known = sorted(token for token in self._banned if token < rules.vocab_size)
        self._banned_ids = torch.tensor(known, dtype=torch.int64)  # a mask may be past the last
        self._never = self._banned | set(rules.eos)  # in the middle of a text
        self._own: _RowProcess | None = None  # once it has anything to do
        self._read: list[int] = []  # tokens that it has read
        self._next = _Answer(built.first)  # what can come after them
        self._draft: list[int] = []  # further tokens, at which it has looked:
        self._allowed = _Answer(child.numbers([0]))  # how many of them can come
        self._masks = _Answer(b"")  # masks after each of those
        self._place = 0  # behind how many of them the state is

    def follow(self, tokens: Sequence[int]) -> None:
        """Be after tokens, all of them allowed where they stand, whatever was followed before."""
        known = _num_shared(self._read, tokens)
        new = list(tokens[known:])
        if known == len(self._read) and new == self._draft[: len(new)]:
            self._place = len(new)
        else:
            self._go(len(self._read) - known, new)

    def look_ahead(self, tokens: Sequence[int]) -> None:
        """Prepare masks after each of the tokens, as far as they could come next."""
        usual = self._usual(tokens)
        if self._place or usual != self._draft[: len(usual)]:
            self._go(0, self._draft[: self._place])
            own = self._process()
            self._draft = usual
            self._allowed = own.ask(child.ALLOWED, usual, len(usual))
            self._masks = own.ask(child.MASKS, usual, len(usual))

    def mask(self) -> Tensor:
        """The tokens that may come next: (V,) bool on the CPU, at least one.

        Where the grammar leaves one way to go on, its characters are spelt as the tokenizer would.
        """
        reply = self._mask()
        bits = np.frombuffer(reply, dtype=np.uint8, offset=1)
        found = np.unpackbits(bits, bitorder="little")[: self._rules.vocab_size].astype(bool)
        mask = torch.zeros(self._rules.vocab_size, dtype=torch.bool)
        mask[: len(found)] = torch.from_numpy(found)
        mask[self._banned_ids] = False
        mask[list(self._rules.eos)] = bool(reply[0])
        if not bool(mask.any()):
            raise GrammarFailed("grammar: no token can follow this text")
        return mask

    def restrict(self, logits: Tensor) -> Tensor:
        """Logits (V,) of what comes next: -inf but for the tokens that may, to which the others
        leave what `TokenPrefixes` says.
        """
        mask = self.mask()
        logits = self._prefixes.pass_on(logits, mask, self._is_json)
        return logits.masked_fill(~mask.to(logits.device), float("-inf"))

    def forced(self) -> list[int]:
        """Tokens that spell what must come next, if anything must."""
        tokens, _ = self._next_reply()
        return [] if self._banned.intersection(tokens) else tokens

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """How many of these tokens could come next, one after the other; the end comes last."""
        self.look_ahead(tokens)
        num_usual = len(self._usual(tokens))
        (most,) = child.from_numbers(self._process().wait_for(self._allowed))
        count = min(most, num_usual)
        is_end = count == num_usual and tokens[count : count + 1] in [
            [eos] for eos in self._rules.eos
        ]
        return count + is_end

    def _usual(self, tokens: Sequence[int]) -> list[int]:
        """The tokens up to the first that the library must not be asked for."""
        return list(itertools.takewhile(lambda token: token not in self._never, tokens))

    def _process(self) -> _RowProcess:
        if self._own is None:
            try:
                copy = self._built.process.fork()
            except ProcessDied as error:
                raise GrammarFailed(f"grammar: its process is lost ({error})") from None
            self._own = _RowProcess(copy, self._rules.vocab_size)
        return self._own

    def _go(self, num_back: int, new: list[int]) -> None:
        """Let the process take back tokens and read new ones."""
        if num_back or new:
            self._next = self._process().ask(child.FOLLOW, [num_back, *new], 1)
            self._read = [*self._read[: len(self._read) - num_back], *new]
        self._draft, self._place = [], 0

    def _next_reply(self) -> tuple[list[int], bytes]:
        """What must come next, if anything must, and the mask of what can."""
        if self._place:
            self._go(0, self._draft[: self._place])
        return _parted(self._next.reply or self._process().wait_for(self._next))

    def _mask(self) -> bytes:
        """The mask where the state is, as the process gave it."""
        if self._place:
            size = len(_parted(self._built.first)[1])
            masks = self._process().wait_for(self._masks)
            mask = masks[size * (self._place - 1) : size * self._place]
            if mask:
                return mask
        return self._next_reply()[1]


def _parted(reply: bytes) -> tuple[list[int], bytes]:
    """A reply on what comes next: tokens that must, and the mask of what can."""
    end = 4 + 4 * child.from_numbers(reply[:4])[0]
    return child.from_numbers(reply[4:end]), reply[end:]


def begin(grammar: Grammar, tokenizer: Tokenizer, rules: TokenRules) -> "GrammarState":
    """The state before the first token. ValueError (one line) as for `build`, and for a grammar
    that allows no text.
    """
    is_json = grammar.kind in ("json_schema", "tool_call")
    state = GrammarState(build(grammar, tokenizer), rules, tokenizer, is_json)
    try:
        state.mask()
    except GrammarFailed as error:
        raise ValueError(str(error)) from None
    return state


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens are the same from the beginning."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
