"""How events become pictures, on events written by hand: the page's module, without its page."""

import json
from typing import Any

import pytest

from page_driver import Driver

pytestmark = pytest.mark.browser

READ = """async (events) => {
  const {Run, groupFrame} = await import('/run.js');
  const run = new Run({mode: 'x', prompt: ''});
  for (const event of JSON.parse(events)) run.take(event);
  return run.frames.map((frame, at) => ({
    text: run.text.slice(0, frame.textLength),
    accepted: frame.accepted, rejected: frame.rejected, tokens: frame.tokens,
    groups: run.groups.map((group) => {
      const shown = groupFrame(run, group, at);
      return shown && shown.cells.slice(0, shown.shown).map((c) => [c.status, c.text, c.order]);
    }),
  }));
}"""


def token(text: str | None, confidence: float | None = 0.9) -> dict[str, Any]:
    """A token of a step; None is a mask. Ids are letters' codes, so equal texts are equal ids."""
    masked = text is None
    id_ = None if text is None else sum(map(ord, text))
    return {"id": id_, "text": text or "", "masked": masked, "confidence": confidence}


def step(block: int, number: int, *texts: str | None) -> dict[str, Any]:
    return {
        "object": "twotower.step",
        "block": block,
        "step": number,
        "nfe": number + 1,
        "elapsed_ms": number + 1,
        "tokens": [token(text) for text in texts],
    }


def commit(
    block: int,
    texts: str,
    drafted: int | None = None,
    accepted: int | None = None,
    drafter: str | None = None,
    rejected: int | None = None,
) -> dict[str, Any]:
    return {
        "object": "twotower.commit",
        "block": block,
        "nfe": 3,
        "context_forwards": 1,
        "elapsed_ms": 9,
        "drafted": drafted,
        "accepted": accepted,
        "drafter": drafter,
        "rejected": rejected,
        "tokens": [{"id": ord(text), "text": text} for text in texts],
    }


def chunk(text: str) -> dict[str, Any]:
    return {"object": "text_completion", "choices": [{"index": 0, "text": text}]}


def end() -> dict[str, Any]:
    choice = {"index": 0, "text": "", "finish_reason": "stop"}
    return {"object": "text_completion", "choices": [choice]}


def frames(tab: Driver, *events: dict[str, Any]) -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = tab.page.evaluate(READ, json.dumps(events))
    return read


def test_a_draft_shows_what_stands_and_what_does_not(tab: Driver) -> None:
    """Guards the marks of verification. The draft is a b c d e, of which four were read; the tower
    wrote a b X: a and b stand, X is its own, d was read in vain, e was not read."""
    *_, drafted, settled = frames(tab, step(0, 0, *"abcde"), commit(0, "abX", 4, 2))
    assert [status for status, _, _ in drafted["groups"][0]] == ["filled"] * 5
    assert settled["groups"][0] == [
        ["kept", "a", 1],
        ["kept", "b", 1],
        ["own", "X", None],
        ["rejected", "d", 1],
        ["dropped", "e", 1],
    ]
    assert (settled["accepted"], settled["rejected"], settled["tokens"]) == (2, 2, 3)


def test_a_draft_that_all_stands_is_followed_by_the_towers_own(tab: Driver) -> None:
    """Guards the last token of a full acceptance: it is the tower's, even where it happens to equal
    the draft's next token, which nobody read."""
    settled = frames(tab, step(0, 0, *"abcd"), commit(0, "abc", 2, 2))[-1]
    assert [status for status, _, _ in settled["groups"][0]] == ["kept", "kept", "own", "dropped"]


def test_copied_tokens_are_not_the_towers_own(tab: Driver) -> None:
    """Guards lookups, which no denoiser pass comes before: what they gave must be told apart."""
    settled = frames(tab, commit(0, "a"), commit(1, "bcd", 3, 2, "lookup"))[-1]
    found = [[status, text] for status, text, _ in settled["groups"][0]]
    assert found == [["own", "a"], ["copied", "b"], ["copied", "c"], ["own", "d"]]


def test_a_text_that_ends_inside_a_draft_rejects_nothing(tab: Driver) -> None:
    settled = frames(tab, step(0, 0, *"abcd"), commit(0, "ab", 4, 2))[-1]
    assert [status for status, _, _ in settled["groups"][0]] == ["kept"] * 2 + ["dropped"] * 2
    assert (settled["accepted"], settled["rejected"]) == (2, 0)


def test_a_review_strikes_out_what_it_gives_back(tab: Driver) -> None:
    """Guards the marks of a verified block: tokens that a reader saw appear do not just vanish, and
    what lies behind the end of a text was not refused."""
    settled = frames(tab, step(0, 0, *"abcd"), commit(0, "ab", rejected=2))[-1]
    assert [status for status, _, _ in settled["groups"][0]] == ["kept"] * 2 + ["rejected"] * 2
    ended = frames(tab, step(0, 0, *"abcd"), commit(0, "a", rejected=2))[-1]
    assert [status for status, _, _ in ended["groups"][0]] == ["kept"] + ["dropped"] * 3
    whole = frames(tab, step(0, 0, *"abcd"), commit(0, "abcd", rejected=0))[-1]
    assert [status for status, _, _ in whole["groups"][0]] == ["kept"] * 4


def test_a_cell_remembers_the_pass_that_filled_it(tab: Driver) -> None:
    """Guards the commit order, also where a sampler masks a position again and fills it again."""
    read = frames(
        tab,
        step(0, 0, "a", None, "c"),
        step(0, 1, None, None, "c"),
        step(0, 2, "a", "b", "c"),
        commit(0, "abc", None, None),
    )
    assert [order for _, _, order in read[1]["groups"][0]] == [1, None, 1]
    assert [order for _, _, order in read[3]["groups"][0]] == [3, 3, 1]
    assert [status for status, _, _ in read[4]["groups"][0]] == ["kept"] * 3


def test_tokens_written_one_by_one_share_a_group(tab: Driver) -> None:
    """Guards AR lanes and pauses of drafting: earlier frames must not see later tokens."""
    read = frames(tab, *(commit(at, text, 0, 0) for at, text in enumerate("xyz")))
    assert [len(frame["groups"][0] or []) for frame in read] == [0, 1, 2, 3]
    assert all(len(frame["groups"]) == 1 for frame in read)


@pytest.mark.parametrize("text_first", [False, True])
def test_text_appears_with_its_commit(tab: Driver, text_first: bool) -> None:
    """Guards the text beside the blocks: whichever of commit and chunk comes first, the text is not
    seen while its block is still being filled."""
    pair = [commit(0, "ab", None, None), chunk("ab")]
    read = frames(tab, step(0, 0, "a", "b"), *(reversed(pair) if text_first else pair))
    assert [frame["text"] for frame in read] == ["", "", "ab"]


def test_nothing_behind_the_end_of_a_text_is_rejected(tab: Driver) -> None:
    """Guards filler that looks as if the context tower had refused it."""
    events = [step(0, 0, *"abcd"), commit(0, "a", rejected=3)]
    assert frames(tab, *events)[-1]["rejected"] is None
    assert [status for status, _, _ in frames(tab, *events)[-1]["groups"][0]][1] == "rejected"
    ended = frames(tab, *events, end())[-1]
    assert [status for status, _, _ in ended["groups"][0]] == ["kept"] + ["dropped"] * 3
    draft = frames(tab, step(0, 0, *"abcd"), commit(0, "ax", 3, 1), end())[-1]
    assert [status for status, _, _ in draft["groups"][0]] == ["kept", "own"] + ["dropped"] * 2


def test_the_context_towers_first_token_is_its_own(tab: Driver) -> None:
    """Guards a token of the context tower that is drawn as the denoiser's, 100 % sure."""
    opened = step(0, 0, "a", "b", None, None)
    opened["tokens"][0]["confidence"] = None
    first, last = frames(tab, opened, commit(0, "abcd"))[1:]
    assert first["groups"][0][:2] == [["own", "a", None], ["filled", "b", 1]]
    assert last["groups"][0][:2] == [["own", "a", None], ["kept", "b", 1]]
