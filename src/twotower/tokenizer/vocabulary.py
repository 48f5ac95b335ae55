"""A vocabulary: its tokens, which of them are special, and the files that keep it.

Decides the special ids of our own tokenizers (0 <pad>, 1 <bos>, 2 <eos>, 3 <mask>).
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Self

import tokenizers

from twotower.arguments import require
from twotower.paths import usable_path
from twotower.tokenizer.rules import read_rule

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# The special tokens of our own tokenizers, in the order of their ids.
ROLES = {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>", "mask": "<mask>"}


def bos_first(token: str, token_id: int) -> dict[str, object]:
    """The step of a tokenizer file that puts bos before each text."""
    bos: dict[str, object] = {"SpecialToken": {"id": token, "type_id": 0}}
    one, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing", "single": [bos, one], "pair": [bos, one, other],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }  # fmt: skip


class Vocabulary:
    """Tokens by id and by name; special tokens by their roles."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        roles: dict[str, str] | None = None,
        adds_bos: bool | None = None,
        chat_template: str | None = None,
    ) -> None:
        """`roles` names the special tokens (keys pad, bos, eos, mask); unnamed ones are looked up
        as ours. `adds_bos`: whether prompts begin with bos, where the file has no post-processor
        that says it; None: as ours do. `chat_template`: Jinja, how a chat becomes a prompt.
        """
        require("backend", backend, tokenizers.Tokenizer, "tokenizers.Tokenizer(...)")
        backend.encode_special_tokens = True  # "<mask>" in text is text
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._rule = read_rule(
            None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        )
        self._bytes: dict[int, bytes] = {}  # of tokens that were asked for
        # Of what byte-level BPE would leave out of a text.
        alphabet = self._rule.alphabet if getattr(backend.model, "unk_token", None) is None else {}
        self._lost = {b for char, b in alphabet.items() if backend.token_to_id(char) is None}
        ids = backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1  # all ids are below it
        self.missing_ids = frozenset(
            set(range(self.vocab_size)).difference(ids) if len(ids) < self.vocab_size else ()
        )
        added = backend.get_added_tokens_decoder()
        self.added_texts = tuple(token.content for token in added.values())
        special = {token_id: token.content for token_id, token in added.items() if token.special}
        self.special_ids, self.special_texts = frozenset(special), tuple(special.values())
        ours = {role: name for role, name in ROLES.items() if name in self.special_texts}
        names = ours | (roles or {})
        self._roles = {role: n for role, n in names.items() if self.token_id(n) is not None}
        ids_of = {role: self.token_id(name) for role, name in self._roles.items()}
        self.pad_id, self.bos_id, self.eos_id, self.mask_id = map(ids_of.get, ROLES)
        self._adds_bos, self.chat_template = adds_bos, chat_template
        self.adds_bos = self.bos_id is not None and self._begins_with_bos()
        """Whether a prompt begins with bos: as the tokenizer's files say, or as ours do."""

    def _begins_with_bos(self) -> bool:
        if self._backend.post_processor is not None:  # which alone counts in transformers 5
            return bool(self._backend.encode("").ids[:1] == [self.bos_id])
        return self._roles["bos"] == ROLES["bos"] if self._adds_bos is None else self._adds_bos

    def json_with_bos(self) -> str | None:
        """The tokenizer file with bos in it, for libraries that go by the file alone; None where it
        says itself how a prompt begins.
        """
        if not self.adds_bos or self._backend.post_processor is not None:
            return None
        return self._json_beginning_with_bos()

    def _json_beginning_with_bos(self) -> str:
        assert self.bos_id is not None
        values = json.loads(self.json_text)
        steps = values["post_processor"], bos_first(self._roles["bos"], self.bos_id)
        values["post_processor"] = {"type": "Sequence", "processors": [*filter(None, steps)]}
        return json.dumps(values, ensure_ascii=False)

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it; None if it has no such token."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def token_name(self, token_id: int) -> str | None:
        """How the vocabulary writes a token; None for an id without one."""
        found: str | None = self._backend.id_to_token(token_id)
        return found

    def with_roles(self, roles: Mapping[str, str], adds_bos: bool | None = None) -> Self:
        """The same vocabulary with other tokens as pad, bos, eos or mask; adds_bos None: as now."""
        asked = self._adds_bos if adds_bos is None else adds_bos
        found = type(self)(self._backend, self._roles | dict(roles), asked, self.chat_template)
        if adds_bos and not found.adds_bos and found.bos_id is not None:
            told = tokenizers.Tokenizer.from_str(found._json_beginning_with_bos())
            return type(self)(told, found._roles, asked, self.chat_template)
        return found

    def within(self, vocab_size: int) -> Self:
        """The same vocabulary without added tokens that a model of so many does not have: they are
        letters in a text.
        """
        if self.vocab_size <= vocab_size:
            return self
        values = json.loads(self.json_text)
        kept = [token for token in values["added_tokens"] if token["id"] < vocab_size]
        if len(kept) == len(values["added_tokens"]):
            return self
        backend = tokenizers.Tokenizer.from_str(json.dumps(values | {"added_tokens": kept}))
        return type(self)(backend, self._roles, self._adds_bos, self.chat_template)

    @cached_property
    def json_text(self) -> str:
        """The tokenizer file's text."""
        text: str = self._backend.to_str()
        return text

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the tokenizer file: equal for equal vocabularies and rules."""
        return hashlib.sha256(self.json_text.encode()).hexdigest()

    def save(self, folder: Path | str) -> None:
        """Write `files` into `folder` (created if needed). ValueError (one line) where that cannot
        be.
        """
        folder = usable_path("folder", folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CHAT_TEMPLATE_FILE).unlink(missing_ok=True)  # of what was there before
            for name, content in self.files().items():
                (folder / name).write_bytes(content)
        except OSError as error:
            raise ValueError(
                f"{folder}: cannot be written ({error.strerror}); choose another place"
            ) from None

    def files(self) -> dict[str, bytes]:
        """The files that `load_tokenizer` reads, by name: what a checkpoint has to carry.
        `tokenizer.json`, `tokenizer_config.json`, and `chat_template.jinja` where there is one.
        """
        config: dict[str, object] = {f"{role}_token": name for role, name in self._roles.items()}
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if self._adds_bos is not None:
            config["add_bos_token"] = self._adds_bos
        template = {} if self.chat_template is None else {CHAT_TEMPLATE_FILE: self.chat_template}
        return {
            TOKENIZER_FILE: self.json_text.encode(),
            TOKENIZER_CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
            **{name: text.encode() for name, text in template.items()},
        }
