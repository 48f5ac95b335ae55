"""What a shard is made of: finding inputs, weights, and the order of a mixture."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.cli.prepare import BUILT_IN as CORPUS
from twotower.lab.corpus import documents
from twotower.train.sources import (
    BUILT_IN,
    Source,
    find_files,
    find_sources,
    mix,
    parse_weights,
    shuffle,
)


def sources_of(
    inputs: Sequence[Path], weights: Mapping[str, float], columns: Sequence[str], seed: int
) -> list[Source]:
    return find_sources(inputs, weights, columns, CORPUS, seed)


def make_files(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"text": "{name}"}}\n')
    return [folder / name for name in names]


def test_a_folder_gives_its_documents_in_order(tmp_path: Path) -> None:
    """Silent failure: the order of a folder differs from machine to machine."""
    make_files(tmp_path, "z/a.jsonl", "b.jsonl", "a.txt", "c.bin", ".hidden/x.jsonl", "m/d.parquet")
    found = [str(file.relative_to(tmp_path)) for file in find_files(tmp_path)]
    assert found == ["a.txt", "b.jsonl", "m/d.parquet", "z/a.jsonl"]
    inside = tmp_path / ".hidden"
    assert find_files(inside) == [inside / "x.jsonl"]  # named by the user: not hidden from him


def test_a_pattern_gives_its_files_in_order(tmp_path: Path) -> None:
    files = make_files(tmp_path, "a1.jsonl", "a2.jsonl", "b.jsonl", "sub/a3.jsonl")
    assert find_files(tmp_path / "a*.jsonl") == files[:2]
    assert find_files(tmp_path / "**" / "a*.jsonl") == [*files[:2], files[3]]
    (odd,) = make_files(tmp_path, "[1].jsonl")
    assert find_files(odd) == [odd]  # a file of that name is no pattern


def test_absent_and_empty_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file or folder .*absent.txt"):
        find_files(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match=r"no file or folder .*x\*.jsonl"):
        find_files(tmp_path / "x*.jsonl")
    with pytest.raises(ValueError, match=r"no .jsonl, .parquet or .txt in folder"):
        find_files(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty.jsonl is empty"):
        find_files(tmp_path)


def test_weights_are_pairs() -> None:
    assert parse_weights(["a=1", "x=y.txt=0.5"]) == {"a": 1.0, "x=y.txt": 0.5}
    for bad in ("a", "=1", "a=", "a=x", "a=-1", "a=nan", "a=inf"):
        with pytest.raises(ValueError, match="is not NAME=NUMBER"):
            parse_weights([bad])
    with pytest.raises(ValueError, match="'a' is given twice"):
        parse_weights(["a=1", "a=2"])


def test_without_inputs_the_source_is_the_built_in_corpus() -> None:
    (source,) = sources_of([], {"math": 1.0}, (), 5)
    expected = itertools.islice(documents("train", 5, {"math": 1.0}), 20)
    assert list(itertools.islice(source.texts(), 20)) == [
        (d.prompt, d.completion) for d in expected
    ]
    with pytest.raises(ValueError, match="category 'poems' is unknown"):
        sources_of([], {"poems": 1.0}, (), 5)


def test_inputs_are_named_by_stem_or_as_given(tmp_path: Path) -> None:
    files = make_files(tmp_path, "a.jsonl", "b.txt", "x/c.jsonl", "y/c.jsonl", "math.jsonl")
    names = [source.name for source in sources_of([*files, tmp_path / "x"], {}, (), 0)]
    assert names == ["a", "b", str(files[2]), str(files[3]), str(files[4]), "x"]
    pattern = tmp_path / "x*" / "*.jsonl"
    assert sources_of([pattern], {}, (), 0)[0].name == str(pattern)


def test_weights_name_inputs_and_categories(tmp_path: Path) -> None:
    a, b = make_files(tmp_path, "a.jsonl", "b.jsonl")
    weights = {"a": 3.0, str(b): 1.0, "math": 1.5, "code": 0.5}
    sources = sources_of([a, b], weights, (), 0)
    assert [(s.name, s.weight) for s in sources] == [("a", 3.0), ("b", 1.0), (BUILT_IN, 2.0)]
    assert list(sources[1].texts()) == [("", "b.jsonl")]
    built_in = itertools.islice(sources[2].texts(), 50)
    expected = itertools.islice(documents("train", 0, {"math": 1.5, "code": 0.5}), 50)
    assert list(built_in) == [(d.prompt, d.completion) for d in expected]


def test_inputs_without_weights_are_spread_by_size(tmp_path: Path) -> None:
    a, b = make_files(tmp_path, "a.jsonl", "b.jsonl")
    with b.open("ab") as stream:
        stream.write(b"\n" * 82)
    assert [s.weight for s in sources_of([a, b], {}, (), 0)] == [20, 102]


BAD_WEIGHTS = {
    "one without": ({"a": 1.0}, "weights: b has none; give b=NUMBER"),
    "none of an input": ({"a": 1.0, "b": 0.0}, "b=0 gives the input no share"),
    "unknown": ({"a": 1.0, "b": 1.0, "c": 1.0}, "'c' is neither input nor category; .* a, b, math"),
    "empty categories": ({"a": 1.0, "b": 1.0, "math": 0.0}, "weights sum to 0"),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_bad_weights_are_one_line(tmp_path: Path, kind: str) -> None:
    weights, words = BAD_WEIGHTS[kind]
    with pytest.raises(ValueError, match=words):
        sources_of(make_files(tmp_path, "a.jsonl", "b.jsonl"), weights, (), 0)


def test_inputs_given_twice_and_columns_of_text_are_refused(tmp_path: Path) -> None:
    a, b = make_files(tmp_path, "a.jsonl", "b.txt")
    with pytest.raises(ValueError, match=r"a.jsonl is given twice"):
        sources_of([a, b, a], {}, (), 0)
    with pytest.raises(ValueError, match="columns: no effect on b"):
        sources_of([b], {}, ["text"], 0)
    assert len(sources_of([a, b], {}, ["text"], 0)) == 2


def test_columns_reach_the_files_that_have_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": "y"}\n')
    (tmp_path / "b.txt").write_text("plain")
    (source,) = sources_of([tmp_path], {}, ["body"], 0)
    assert list(source.texts()) == [("", "x"), ("", "plain")]


@given(
    lengths=st.lists(st.lists(st.integers(1, 50), min_size=1), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 10.0), min_size=4, max_size=4),
)
def test_a_mixture_keeps_its_shares_to_one_document(
    lengths: list[list[int]], weights: list[float]
) -> None:
    """Silent failure: a share is one of documents, so that a source of long ones takes over; or
    documents are lost, repeated or out of their order.
    """
    weights = weights[: len(lengths)]
    taken = [0] * len(lengths)
    items: list[list[int]] = [[] for _ in lengths]
    longest = [max(source) for source in lengths]
    for at, length in mix(list(map(iter, lengths)), weights, lambda n: n, is_strict=True):
        items[at].append(length)
        taken[at] += length
        per_weight = [t / w for t, w in zip(taken, weights, strict=True)]
        # The one that was furthest behind may now be ahead, by no more than its one document.
        slack = max(n / w for n, w in zip(longest, weights, strict=True))
        assert max(per_weight) - min(per_weight) <= slack + 1e-6
    for kept, source in zip(items, lengths, strict=True):
        assert kept == source[: len(kept)]
    assert any(kept == source for kept, source in zip(items, lengths, strict=True))


def test_without_shares_to_keep_everything_is_read() -> None:
    """Silent failure: the end of one file drops the rest of the others."""
    streams = [iter("aaa"), iter("b"), iter("cccccc")]
    mixed = [item for _, item in mix(streams, [1.0, 1.0, 2.0], len, is_strict=False)]
    assert "".join(mixed) == "abccaccacc"
    strict = mix([iter("aaa"), iter("b"), iter("cccccc")], [1.0, 1.0, 2.0], len, is_strict=True)
    assert "".join(item for _, item in strict) == "abcca"


@given(count=st.integers(0, 60), size=st.integers(1, 20), seed=st.text(max_size=3))
def test_shuffling_keeps_every_document_once(count: int, size: int, seed: str) -> None:
    """Silent failure: what is still waiting at the end is lost."""
    drawn = list(shuffle(iter(range(count)), size, seed))
    assert sorted(drawn) == list(range(count))
    assert drawn == list(shuffle(iter(range(count)), size, seed))
    assert all(value <= at + size for at, value in enumerate(drawn))  # no more is held


def test_shuffling_depends_on_the_seed() -> None:
    orders = {tuple(shuffle(iter(range(50)), 10, seed)) for seed in ("a", "b")}
    assert len(orders) == 2 and tuple(range(50)) not in orders
