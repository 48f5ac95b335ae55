"""From documents to shards."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_training import make_shard, write_documents
from twotower.cli.prepare import BUILT_IN
from twotower.lab.corpus import documents
from twotower.tokenizer import load_tokenizer
from twotower.train.data import Rows
from twotower.train.prepare import PrepareOptions, encode_documents, prepare
from twotower.train.shard import Shard, ShardWriter


def run(**options: object) -> Shard:
    chosen = PrepareOptions(**options)  # type: ignore[arg-type]  # tests pass plain values
    for _ in prepare(chosen, BUILT_IN):
        pass
    return Shard(chosen.output)


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
    for (plain, start, _), (aligned, begin, context) in zip(
        encode_documents(tokenizer, texts), encode_documents(tokenizer, texts, 8), strict=True
    ):
        assert context % 8 == 0
        assert (start, begin) == (0, aligned.index(1))
        assert begin < 8 and set(aligned[:begin]) <= {2}
        assert aligned[begin : begin + len(plain)] == plain
        rest = aligned[begin + len(plain) :]
        assert len(rest) < 8 and set(rest) <= {2}
        assert len(aligned) % 8 == 0
    prompt = 1 + len(tokenizer.encode(texts[0][0]))
    first, begin, context = encode_documents(tokenizer, texts, 8)[0]
    assert first.index(1) + prompt == begin + prompt == context


def test_shards_say_which_tokens_are_completions(tmp_path: Path) -> None:
    """Silent failure: the denoiser is trained on prompts, or never on the EOS that ends a text."""
    shard = Shard(make_shard(tmp_path / "shard", count=20))
    tokenizer = load_tokenizer(shard.folder)
    marked = shard.tokens[:][shard.is_completion(slice(None))].tolist()
    expected = [[*tokenizer.encode(f"it is {i % 10}.\n"), 2] for i in range(20)]
    assert marked == [token for ids in expected for token in ids]


def test_built_in_corpus_is_the_default(tmp_path: Path) -> None:
    shard = run(
        output=tmp_path / "shard", tokens=3000, vocab_size=400, tokenizer_documents=200, seed=7
    )
    tokenizer = load_tokenizer(shard.folder)
    first = next(iter(documents("train", 7)))
    ids, _, _ = encode_documents(tokenizer, [(first.prompt, first.completion)])[0]
    assert shard.tokens[: len(ids)].tolist() == ids
    assert shard.meta.vocab_size == tokenizer.vocab_size == 400
    assert shard.meta.tokenizer_sha256 == tokenizer.fingerprint


def test_same_options_same_shard(tmp_path: Path) -> None:
    """Silent failure: a run cannot be repeated because its data cannot."""
    options = {"tokens": 2000, "vocab_size": 300, "tokenizer_documents": 100}
    one, two = (run(output=tmp_path / name, seed=3, **options).meta for name in ("one", "two"))
    other = run(output=tmp_path / "other", seed=4, **options).meta
    assert one == two != other


def test_token_limit_keeps_the_last_document_whole(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "d.jsonl", 1000)
    shard = run(output=tmp_path / "shard", input=(source,), tokens=500, vocab_size=270)
    assert 500 <= shard.meta.num_tokens < 540
    assert shard.tokens[:][-1] == 2
    assert np.count_nonzero(shard.tokens[:] == 2) == shard.meta.num_documents


def test_plain_text_documents_are_separated_by_blank_lines(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("first\nstill first\n\n \nsecond")
    shard = run(output=tmp_path / "shard", input=(source,), vocab_size=260)
    assert documents_of(shard) == ["first\nstill first\n", "second"]


def test_a_given_tokenizer_is_kept(tmp_path: Path) -> None:
    first = make_shard(tmp_path / "first")
    second = run(output=tmp_path / "second", tokenizer=first, tokens=1000)
    assert second.meta.tokenizer_sha256 == load_tokenizer(first).fingerprint


def test_an_existing_shard_is_only_replaced_on_request(tmp_path: Path) -> None:
    folder = make_shard(tmp_path / "shard")
    before = Shard(folder).meta
    source = write_documents(tmp_path / "other.jsonl", 10)
    with pytest.raises(ValueError, match="choose another folder or overwrite=True"):
        run(output=folder, input=(source,))
    assert Shard(folder).meta == before
    assert run(output=folder, input=(source,), overwrite=True).meta.num_documents == 10
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
        run(output=tmp_path / "letters", overwrite=True)
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
        {"eos_token": "<eos>"},
        {"input": (Path("x"),), "shuffle": -1},
        {"shuffle": 5},
        {"columns": ("text",)},
        {"input": (Path("x"),), "columns": ("a", "b", "c")},
        {"weights": ("math",)},
        {"tokenizer": Path("a"), "tokenizer_documents": 9},
    ],
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(reversed(options))):
        PrepareOptions(**options)  # type: ignore[arg-type]  # wrong values on purpose


def write_texts(file: Path, word: str, count: int) -> Path:
    file.write_text("".join(json.dumps({"text": f"{word} {i}"}) + "\n" for i in range(count)))
    return file


def documents_of(shard: Shard) -> list[str]:
    tokenizer = load_tokenizer(shard.folder)
    ends = [0, *(np.flatnonzero(shard.tokens[:] == 2) + 1).tolist()]
    return [tokenizer.decode(shard.tokens[a:b].tolist()) for a, b in itertools.pairwise(ends)]


def test_weights_are_shares_of_tokens(tmp_path: Path) -> None:
    """Silent failure: a mixture by documents, in which the source of long ones takes over."""
    short = write_texts(tmp_path / "short.jsonl", "a", 3000)
    long = write_texts(tmp_path / "long.jsonl", "word " * 40, 3000)
    options = {"input": (short, long), "weights": ("short=3", "long=1"), "tokens": 6000}
    shard = run(output=tmp_path / "shard", vocab_size=260, **options)
    documents = documents_of(shard)
    held = {name: tokens / shard.meta.num_tokens for name, tokens in shard.meta.sources.items()}
    assert held["short"] == pytest.approx(0.75, abs=250 / 6000)  # one long document
    assert sum(held.values()) == 1.0
    num_short = sum(text.startswith("a ") for text in documents)
    assert num_short > 20 * (len(documents) - num_short) > 0
    assert documents[:2] == ["a 0", "word " * 40 + " 0"]


def test_a_mixture_ends_with_its_first_input(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Silent failure: documents are repeated to keep a share, also into the held-out rows."""
    a, b = write_texts(tmp_path / "a.jsonl", "a", 50), write_texts(tmp_path / "b.jsonl", "b", 50)
    shard = run(output=tmp_path / "one", input=(a, b), weights=("a=1", "b=4"), vocab_size=260)
    documents = documents_of(shard)
    assert sum(text.startswith("b ") for text in documents) == 50
    assert 11 <= sum(text.startswith("a ") for text in documents) <= 14
    assert "one input has ended" in caplog.text
    every = documents_of(run(output=tmp_path / "two", input=(a, b), vocab_size=260))
    assert sorted(every) == sorted(f"{word} {i}" for word in "ab" for i in range(50))


def test_inputs_mix_with_the_built_in_corpus(tmp_path: Path) -> None:
    a = write_texts(tmp_path / "a.jsonl", "a", 2000)
    weights = ("a=1", "math=0.5", "code=0.5")
    options = {"weights": weights, "tokens": 4000, "vocab_size": 300, "tokenizer_documents": 100}
    meta = run(output=tmp_path / "shard", input=(a,), **options).meta
    assert meta.sources["a"] == pytest.approx(meta.sources["built-in corpus"], abs=300)


def test_order_depends_on_the_seed_only_when_shuffled(tmp_path: Path) -> None:
    """Silent failure: the same command gives other data, or another seed the same."""
    a = write_texts(tmp_path / "a.jsonl", "a", 100)
    plain = documents_of(run(output=tmp_path / "plain", input=(a,), vocab_size=260))
    assert plain == [f"a {i}" for i in range(100)]
    with pytest.raises(ValueError, match=r"^seed: no effect on inputs without shuffle"):
        run(output=tmp_path / "seeded", input=(a,), vocab_size=260, seed=1)
    drawn = [
        documents_of(
            run(output=tmp_path / f"{i}", input=(a,), vocab_size=260, seed=seed, shuffle=30)
        )
        for i, seed in enumerate((1, 1, 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2] != plain
    assert sorted(drawn[0]) == sorted(drawn[2]) == sorted(plain)


def test_a_document_longer_than_a_row_goes_on_in_the_next(tmp_path: Path) -> None:
    """Silent failure: what does not fit a row is dropped."""
    text = " ".join(map(str, range(400)))
    (tmp_path / "a.txt").write_text(text)
    shard = run(output=tmp_path / "shard", input=(tmp_path / "a.txt",), vocab_size=260)
    tokenizer = load_tokenizer(shard.folder)
    rows = Rows(shard, 64, seed=0)
    read = torch.cat([rows.training(i, 1).tokens[0] for i in range(rows.num_training)]).tolist()
    expected = [1, *tokenizer.encode(text)][: rows.num_training * 64]
    assert sorted(read) == sorted(expected)
    assert shard.tokens[:].tolist() == [1, *tokenizer.encode(text), 2]


@pytest.mark.parametrize("bad", ["", "{", '{"text": 1}\n', '{"body": "x"}\n'])
def test_bad_input_leaves_everything_as_it_was(tmp_path: Path, bad: str) -> None:
    """Silent failure: a fault in the last line costs the shard that was there."""
    folder = make_shard(tmp_path / "shard")
    before = Shard(folder).meta
    good = write_texts(tmp_path / "a.jsonl", "a", 600)
    (tmp_path / "b.jsonl").write_text(bad)
    names = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"input: .*b.jsonl"):
        run(output=folder, input=(good, tmp_path / "b.jsonl"), overwrite=True)
    assert Shard(folder).meta == before
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    """Silent failure: the only shard is left under another name and deleted by the next run."""
    folder = make_shard(tmp_path / "shard")
    before = Shard(folder).meta
    folder.rename(tmp_path / ".shard.old")
    with pytest.raises(ValueError, match="no file or folder"):
        run(output=folder, input=(tmp_path / "absent",), overwrite=True)
    assert Shard(folder).meta == before


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent failure: a shard that is cut where the disk was full."""
    folder = make_shard(tmp_path / "shard")
    before = Shard(folder).meta

    def fill(self: ShardWriter, ids: list[int], begin: int, context: int) -> None:
        with Path("/dev/full").open("wb", buffering=0) as stream:
            stream.write(b"0")

    monkeypatch.setattr(ShardWriter, "append", fill)
    with pytest.raises(ValueError, match=r"output: no room for a new .*No space left on device"):
        run(output=folder, input=(tmp_path / "documents.jsonl",), overwrite=True)
    assert Shard(folder).meta == before
    assert not (tmp_path / ".shard.new").exists()


def test_the_library_reads_inputs_only(tmp_path: Path) -> None:
    """The generated corpus is the laboratory's, which the library does not import."""
    with pytest.raises(ValueError, match="input: missing"):
        list(prepare(PrepareOptions(output=tmp_path / "shard")))


def test_the_built_in_corpus_needs_no_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    options = {"tokens": 1000, "vocab_size": 260, "tokenizer_documents": 10}
    assert run(output=tmp_path / "shard", **options).meta.num_tokens >= 1000
