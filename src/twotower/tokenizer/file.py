"""tokenizer.json and tokenizer_config.json: read within bounds.

A tokenizer file comes with a model, from whoever made that. Its own library aborts the process, or
runs for hours, on some that are damaged or hostile; so size, depth, counts and rules are checked
here before the library sees them, and what was checked is what it gets.
"""

import base64
import json
import logging
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from twotower.paths import usable_path
from twotower.tokenizer.patterns import why_refused
from twotower.tokenizer.rules import flatten
from twotower.tokenizer.text import Tokenizer, refused_panics
from twotower.tokenizer.vocabulary import (
    CHAT_TEMPLATE_FILE,
    ROLES,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)

# Well above the largest that is published (34 MB, 262,144 tokens, 514,906 merges).
MAX_BYTES, MAX_VALUES, MAX_IDS = 64 << 20, 8_000_000, 1 << 21
MAX_TOKEN_CHARS, MAX_STEPS, MAX_DEPTH = 4096, 64, 6
MAX_TEMPLATE_CHARS = 1 << 20
_log = logging.getLogger(__name__)
MAX_GROWTH = 64  # times that normalising may lengthen a text
MAX_WORD_CHARS = 1000  # of WordPiece, whose time goes with the square
MAX_AROUND = 64  # special tokens that are put around a text
_PARTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer from a folder with `tokenizer.json` or from that file itself.

    Special tokens are named by `tokenizer_config.json` beside it, when present; a chat template is
    there, too, or in `chat_template.jinja`.
    ValueError (one line) when the file is missing, damaged, of another kind or out of bounds.
    """
    path = usable_path("tokenizer", path)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"tokenizer: no file {file}; give a folder that holds {TOKENIZER_FILE}, or that file"
        )
    content = _read_json_object(file)
    if "model" not in content:
        raise ValueError(
            f"tokenizer: {file} is not a tokenizer file (it has no 'model'); give a "
            f"{TOKENIZER_FILE}"
        )
    try:
        check_content(content)
        with refused_panics("loading"):
            backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        _check_added(content, backend)
    except Exception as error:  # the library raises bare Exception for a damaged file
        reason = " ".join(str(error).split()).removeprefix("tokenizer: ")[:300]
        raise ValueError(
            f"tokenizer: {file} cannot be read ({reason}); get the file again"
        ) from error
    config = file.parent / TOKENIZER_CONFIG_FILE
    named = _read_json_object(config) if config.is_file() else {}
    special, adds_bos = _special_tokens(named), named.get("add_bos_token")
    roles = {role: special[name] for role in ROLES if (name := f"{role}_token") in special}
    asked = adds_bos if isinstance(adds_bos, bool) else None
    found = Tokenizer(backend, roles, asked, _usable_template(file.parent))
    if isinstance(adds_bos, bool) and found.bos_id is not None and found.adds_bos != adds_bos:
        _log.warning(
            "%s: add_bos_token=%s contradicts the post-processor of %s, which counts, as in "
            "transformers: prompts begin %s bos",
            config, json.dumps(adds_bos), TOKENIZER_FILE, "with" if found.adds_bos else "without",
        )  # fmt: skip
    return found


def _read_json_object(file: Path) -> dict[str, Any]:
    size = usable_path("tokenizer", file).stat().st_size
    if size > MAX_BYTES:
        raise ValueError(
            f"tokenizer: {file} has {size >> 20} MiB; at most {MAX_BYTES >> 20} are read"
        )
    data = file.read_bytes()
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"tokenizer: {file} has more than {MAX_VALUES:,} values; get another one")
    try:
        content = json.loads(data)
    except RecursionError:
        raise ValueError(f"tokenizer: {file} is nested too deeply; get the file again") from None
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"tokenizer: {file} is not JSON ({error}); get the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"tokenizer: {file} holds no JSON object; get the file again")
    return content


def load_fitting_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """A folder's tokenizer if it has one, without what a model of that vocabulary does not have:
    fine-tunes add tokens to the one and leave the other as it is.
    """
    if not (folder / TOKENIZER_FILE).exists():
        return None
    tokenizer = load_tokenizer(folder)
    found = tokenizer.within(vocab_size)
    if lost := sorted(set(tokenizer.added_texts) - set(found.added_texts)):
        _log.warning(
            "%s: tokens outside the model's vocabulary of %d are read as text: %s",
            folder / TOKENIZER_FILE, vocab_size, reprlib.repr(lost),
        )  # fmt: skip
    return found


def _usable_template(folder: Path) -> str | None:
    """A folder's chat template; a line of the log for one that cannot be read."""
    try:
        template = read_chat_template(folder)[0]
        (template or "").encode()  # JSON can name half a character, which no file can hold
        return template
    except ValueError as error:
        reason = str(error).removeprefix("chat_template: ")
        _log.warning("chat_template of %s is left out: %s", folder, reason)
        return None


def read_chat_template(
    folder: Path, instead: Path | None = None
) -> tuple[str | None, dict[str, str]]:
    """A folder's chat template, if any, and its special tokens by the names that templates use.

    The template is chat_template.jinja, else the (default) one in tokenizer_config.json, or that of
    the file which is given instead. ValueError (one line) if it cannot be read.
    """
    file, config_file = instead or folder / CHAT_TEMPLATE_FILE, folder / TOKENIZER_CONFIG_FILE
    if instead is not None and not instead.is_file():
        raise ValueError(f"chat_template: there is no file {instead}")
    config = _read_json_object(config_file) if config_file.is_file() else {}
    source = _named_template(config)
    if file.is_file():
        try:
            with file.open(encoding="utf-8") as stream:
                source = stream.read(MAX_TEMPLATE_CHARS + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"chat_template: cannot read {file} ({error})") from None
    if source is not None and len(source) > MAX_TEMPLATE_CHARS:
        raise ValueError(
            f"chat_template: that of {folder} has more than {MAX_TEMPLATE_CHARS} characters; no "
            "template needs so many"
        )
    return source, _special_tokens(config)


def _named_template(config: Mapping[str, Any]) -> str | None:
    """The chat template inside a tokenizer_config.json; of several, by name, the default one."""
    template = config.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in entries}.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """By names such as bos_token; each is stored as a string or as {"content": string}."""
    found = {}
    for name, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def check_content(content: Mapping[str, Any]) -> None:
    """ValueError (one line) for what the library could not load or use in bounded time and
    memory.
    """
    _check_ids(content)
    for part, members in _PARTS.items():
        steps = list(_steps(content.get(part), members))
        if len(steps) > MAX_STEPS:
            raise ValueError(f"{part}: {len(steps)} steps; at most {MAX_STEPS} are read")
        growth = 1.0
        for step in steps:
            growth *= _growth(step)
            if growth > MAX_GROWTH:
                raise ValueError(f"{part}: makes texts more than {MAX_GROWTH} times as long")
            for pattern in _patterns(step):
                if reason := why_refused(pattern):
                    raise ValueError(f"{part}: the pattern {pattern[:80]!r} {reason}")
            _check_around(step)


def _check_ids(content: Mapping[str, Any]) -> None:
    """Every token has an id of its own, in bounds, and a sane length."""
    model, added = content["model"], content.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(added, list):
        raise ValueError("'model' must be an object and 'added_tokens' a list")
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        tokens = list(vocabulary.items())
    elif isinstance(vocabulary, list):  # Unigram: a token and its score each
        tokens = [(pair[0], place) for place, pair in enumerate(vocabulary) if pair]
    else:
        raise ValueError("'model' has no 'vocab'")
    tokens += [(t.get("content"), t.get("id")) for t in added if isinstance(t, dict)]
    owners: dict[int, str] = {}
    for token, number in tokens:
        if not isinstance(token, str) or type(number) is not int or not 0 <= number < MAX_IDS:
            raise ValueError(f"token {str(token)[:40]!r} has the id {str(number)[:40]}")
        if len(token) > MAX_TOKEN_CHARS:
            raise ValueError(f"token {number} has {len(token)} characters")
        if owners.setdefault(number, token) != token:
            raise ValueError(f"tokens {owners[number][:40]!r} and {token[:40]!r} share id {number}")
    _check_merges(model)
    if model.get("dropout"):
        raise ValueError("'dropout' would encode a text differently each time; set it to null")
    longest = model.get("max_input_chars_per_word", 0)
    if type(longest) is not int or longest > MAX_WORD_CHARS:
        raise ValueError(f"'max_input_chars_per_word' is above {MAX_WORD_CHARS}")


def _check_merges(model: Mapping[str, Any]) -> None:
    """The library cuts the prefix of continuing pieces off by its length, and aborts inside a
    character.
    """
    prefix = model.get("continuing_subword_prefix")
    if not prefix or not isinstance(prefix, str):
        return
    for merge in model.get("merges") or []:
        last = merge.split(" ")[-1] if isinstance(merge, str) else merge[-1] if merge else ""
        if not str(last).startswith(prefix):
            raise ValueError(
                f"the last part of the merge {str(merge)[:40]!r} lacks the prefix "
                f"{prefix[:40]!r} of continuing pieces"
            )


def _check_added(content: Mapping[str, Any], backend: tokenizers.Tokenizer) -> None:
    """The library numbers added tokens by itself; where the file says otherwise, all ids after it
    would be others than the model's.
    """
    for token in content.get("added_tokens") or []:
        number = backend.token_to_id(token["content"])
        if number != token["id"]:
            raise ValueError(
                f"added token {token['content'][:40]!r} has the id {token['id']} and would be "
                f"read as {number}: ids before it are missing"
            )


def _steps(part: Any, members: str) -> list[Mapping[str, Any]]:
    """The steps of a part, its form and depth checked."""
    level = [part]
    for _ in range(MAX_DEPTH):
        level = [m for p in level if isinstance(p, dict) for m in p.get(members) or []]
        if not level:
            break
    else:
        raise ValueError(f"{members}: nested more than {MAX_DEPTH} deep")
    try:
        return flatten(part, members)
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{members}: not a list of steps") from None


def _patterns(step: Mapping[str, Any]) -> Iterator[str]:
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        yield pattern["Regex"]


def _growth(step: Mapping[str, Any]) -> float:
    """How many times as long a step can make a text, at most."""
    match step:
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            if not old:
                raise ValueError("replaces the empty text")
            return max(1.0, len(new.encode()) / len(old.encode()))
        case {"type": "Replace", "content": str(new)}:
            return 1.0 + len(new.encode())  # a regex may match anywhere
        case {"type": "Prepend", "prepend": str(new)}:
            return 1.0 + len(new.encode()) / MAX_TOKEN_CHARS
        case {"type": "Precompiled", "precompiled_charsmap": str(text)}:
            return _charsmap_growth(text)
    return 1.0


def _check_around(step: Mapping[str, Any]) -> None:
    """A template names special tokens, each of which may stand for several ids."""
    if step.get("type") != "TemplateProcessing":
        return
    known = step.get("special_tokens") or {}
    sizes = {name: len(token["ids"]) for name, token in known.items()}
    for name in ("single", "pair"):
        pieces = step.get(name) or []
        named = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
        count = len(pieces) + sum(sizes.get(one, 0) for one in named)
        if count > MAX_AROUND:
            raise ValueError(f"post_processor: '{name}' has {count} parts; at most {MAX_AROUND}")


def _charsmap_growth(text: str) -> float:
    """sentencepiece's table: the size of a tree in 4 bytes, the tree, texts that end in a 0."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError("'precompiled_charsmap' is not base64") from None
    size = int.from_bytes(data[:4], "little")
    if len(data) < 8 or size % 4 or size > len(data) - 4:
        raise ValueError("'precompiled_charsmap' is damaged")
    longest = max(map(len, data[4 + size :].split(b"\0")))
    return max(1.0, longest / 3) if longest <= 3 * MAX_GROWTH else float("inf")
