"""Which tokens begin, end, fill and mask the documents of a shard.

They are the tokenizer's: named in its tokenizer_config.json, by id in the generation_config.json
beside it, or by the user. Nothing is guessed: an id that happens to be 1, 2 or 3 may be a quotation
mark.
"""

from collections.abc import Mapping
from pathlib import Path

from twotower.families import read_json
from twotower.tokenizer import Tokenizer, load_tokenizer
from twotower.train.shard import SpecialTokens

_GENERATION_FILE = "generation_config.json"


def open_tokenizer(path: Path, named: Mapping[str, str]) -> Tokenizer:
    """The tokenizer of a folder or file, with an eos; `named` are tokens by role (bos, eos, mask)
    that win over its own. A named bos begins prompts too.

    ValueError (one line) for a token that it does not have, for a missing eos, and for a mask that
    text can hold.
    """
    tokenizer = load_tokenizer(path)
    for role, name in named.items():
        if tokenizer.token_id(name) is None:
            raise ValueError(
                f"{role}_token: {name!r} is not a token of {path}; write it as its vocabulary does"
            )
    roles = _roles_by_id(tokenizer, path) | dict(named)
    tokenizer = tokenizer.with_roles(roles, adds_bos=True if "bos" in named else None)
    if tokenizer.eos_id is None:
        raise ValueError(
            f"eos_token: {path} names none; say which token ends a text with eos_token=..., e.g. "
            f"one of {', '.join(tokenizer.special_texts[:4]) or 'its special tokens'}"
        )
    _check_mask(tokenizer, path)
    return tokenizer


def find_special_tokens(tokenizer: Tokenizer, path: Path | None) -> SpecialTokens:
    """The ids of a tokenizer that has an eos, and of the folder that it came from, if any."""
    eos = tokenizer.eos_id
    assert eos is not None
    more = () if path is None else _generation_ids(path, "eos", tokenizer.vocab_size)
    ends = (eos, *(token for token in more if token != eos))
    ids = {"bos": tokenizer.bos_id, "pad": tokenizer.pad_id, "mask": tokenizer.mask_id}
    return SpecialTokens(eos=ends, **ids)


def _check_mask(tokenizer: Tokenizer, path: Path) -> None:
    mask = tokenizer.mask_id
    if mask is None:
        return
    name = tokenizer.token_name(mask)
    if mask not in tokenizer.special_ids:
        raise ValueError(
            f"mask_token: {name!r} of {path} is an ordinary token, which text can hold; give a "
            "special token with mask_token=..."
        )
    if mask in (tokenizer.bos_id, tokenizer.eos_id):
        raise ValueError(
            f"mask_token: {name!r} of {path} begins or ends documents; give another one with "
            "mask_token=..."
        )


def _roles_by_id(tokenizer: Tokenizer, path: Path) -> dict[str, str]:
    """Roles that generation_config.json gives by id where the tokenizer names no token."""
    found: dict[str, str] = {}
    for role, own in (
        ("bos", tokenizer.bos_id),
        ("eos", tokenizer.eos_id),
        ("pad", tokenizer.pad_id),
    ):
        ids = () if own is not None else _generation_ids(path, role, tokenizer.vocab_size)
        if ids and (name := tokenizer.token_name(ids[0])) is not None:
            found[role] = name
    return found


def _generation_ids(path: Path, role: str, vocab_size: int) -> tuple[int, ...]:
    """The ids of a role in the generation_config.json of a tokenizer's folder: none, one, many.

    Ids past the tokenizer's vocabulary pad the model's and stand for no text: left out.
    """
    file = (path if path.is_dir() else path.parent) / _GENERATION_FILE
    value = read_json(file).get(f"{role}_token_id") if file.is_file() else None
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if any(type(token) is not int for token in ids):
        raise ValueError(f"{file}: {role}_token_id {value!r} is not a token id; correct the file")
    return tuple(token for token in ids if 0 <= token < vocab_size)
