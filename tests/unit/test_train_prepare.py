"""From documents to shards."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from tiny_training import make_shard, write_documents
from twotower.corpus import documents
from twotower.tokenizer import load_tokenizer
from twotower.train.prepare import encode_documents, prepare
from twotower.train.prepare_options import PrepareOptions
from twotower.train.shard import Shard


def run(**options: object) -> Shard:
    chosen = PrepareOptions(**options)  # type: ignore[arg-type]  # tests pass plain values
    for _ in prepare(chosen):
        pass
    return Shard(chosen.out)


def test_documents_are_packed_with_bos_and_eos(tmp_path: Path) -> None:
    """Silent failure: the prompt's and completion's border is merged into one token."""
    folder = make_shard(tmp_path / "shard", count=20)
    tokenizer = load_tokenizer(folder)
    expected = []
    for line in (tmp_path / "documents.jsonl").read_text().splitlines():
        record = json.loads(line)
        prompt, completion = (
            tokenizer.encode(record["prompt"]),
            tokenizer.encode(record["completion"]),
        )
        expected += [1, *prompt, *completion, 2]
    assert Shard(folder).tokens[:].tolist() == expected
    assert Shard(folder).meta.num_documents == 20


def test_aligned_completions_fill_whole_blocks(tmp_path: Path) -> None:
    """Silent failure: a denoiser trains on blocks that begin inside prompts, as no block does when
    it generates, and never learns what follows an EOS in the block.
    """
    tokenizer = load_tokenizer(make_shard(tmp_path / "shard"))
    texts = [("Say 1: ", "it is 1.\n"), ("Say 10 and 2 and 3: ", "it is.\n"), ("", "it")]
    for (plain, _), (aligned, context) in zip(
        encode_documents(tokenizer, texts), encode_documents(tokenizer, texts, 8), strict=True
    ):
        assert context % 8 == 0
        begin = aligned.index(1)
        assert begin < 8 and set(aligned[:begin]) <= {2}
        assert aligned[begin : begin + len(plain)] == plain
        rest = aligned[begin + len(plain) :]
        assert len(rest) < 8 and set(rest) <= {2}
        assert len(aligned) % 8 == 0
    prompt = 1 + len(tokenizer.encode(texts[0][0]))
    first, context = encode_documents(tokenizer, texts, 8)[0]
    assert first.index(1) + prompt == context


def test_shards_say_which_tokens_are_completions(tmp_path: Path) -> None:
    """Silent failure: the denoiser is trained on prompts, or never on the EOS that ends a text."""
    shard = Shard(make_shard(tmp_path / "shard", count=20))
    tokenizer = load_tokenizer(shard.folder)
    marked = shard.tokens[:][shard.completions[:] == 1].tolist()
    expected = [[*tokenizer.encode(f"it is {i % 10}.\n"), 2] for i in range(20)]
    assert marked == [token for ids in expected for token in ids]


def test_built_in_corpus_is_the_default(tmp_path: Path) -> None:
    shard = run(
        out=tmp_path / "shard", tokens=3000, vocab_size=400, tokenizer_documents=200, seed=7
    )
    tokenizer = load_tokenizer(shard.folder)
    first = next(iter(documents("train", 7)))
    ids, _ = encode_documents(tokenizer, [(first.prompt, first.completion)])[0]
    assert shard.tokens[: len(ids)].tolist() == ids
    assert shard.meta.vocab_size == tokenizer.vocab_size == 400
    assert shard.meta.tokenizer_sha256 == tokenizer.fingerprint


def test_same_options_same_shard(tmp_path: Path) -> None:
    """Silent failure: a run cannot be repeated because its data cannot."""
    options = {"tokens": 2000, "vocab_size": 300, "tokenizer_documents": 100}
    one, two = (run(out=tmp_path / name, seed=3, **options).meta for name in ("one", "two"))
    other = run(out=tmp_path / "other", seed=4, **options).meta
    assert one == two != other


def test_token_limit_keeps_the_last_document_whole(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "d.jsonl", 1000)
    shard = run(out=tmp_path / "shard", input=(source,), tokens=500, vocab_size=270)
    assert 500 <= shard.meta.num_tokens < 540
    assert shard.tokens[:][-1] == 2
    assert np.count_nonzero(shard.tokens[:] == 2) == shard.meta.num_documents


def test_plain_text_documents_are_separated_by_blank_lines(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("first\nstill first\n\n \nsecond")
    shard = run(out=tmp_path / "shard", input=(source,), vocab_size=260)
    tokenizer = load_tokenizer(shard.folder)
    ends = [0, *(np.flatnonzero(shard.tokens[:] == 2) + 1).tolist()]
    texts = [tokenizer.decode(shard.tokens[a:b].tolist()) for a, b in itertools.pairwise(ends)]
    assert texts == ["first\nstill first\n", "second"]


def test_a_given_tokenizer_is_kept(tmp_path: Path) -> None:
    first = make_shard(tmp_path / "first")
    second = run(out=tmp_path / "second", tokenizer=first, tokens=1000)
    assert second.meta.tokenizer_sha256 == load_tokenizer(first).fingerprint


def test_an_existing_shard_is_only_replaced_on_request(tmp_path: Path) -> None:
    folder = make_shard(tmp_path / "shard")
    before = Shard(folder).meta
    source = write_documents(tmp_path / "other.jsonl", 10)
    with pytest.raises(ValueError, match="--overwrite"):
        run(out=folder, input=(source,))
    assert Shard(folder).meta == before
    assert run(out=folder, input=(source,), overwrite=True).meta.num_documents == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "documents.jsonl",
        "other.jsonl",
        "shard",
    ]


def test_another_folder_is_never_replaced(tmp_path: Path) -> None:
    """Silent failure: --out of a typo deletes somebody's files."""
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("dear")
    with pytest.raises(ValueError, match="not a token shard"):
        run(out=tmp_path / "letters", overwrite=True)
    assert (tmp_path / "letters" / "love.txt").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 0},
        {"vocab_size": 200},
        {"seed": -1},
        {"tokenizer_documents": 0},
        {"align": 0},
        {"tokenizer": Path("x"), "vocab_size": 300},
    ],
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(reversed(options))):
        PrepareOptions(**options)  # type: ignore[arg-type]  # wrong values on purpose
