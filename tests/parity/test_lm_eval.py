"""lm-eval's requests answered by the adapter, against lm-eval's own model class on the exported
context tower.

Its `hf` model knows nothing of ours but the exported weights and tokenizer; only the bos that our
models always start from must be written out for it.
"""

import pytest

import twotower
from tiny_checkpoint import TEXT, make_text_checkpoint
from twotower.checkpoint import export_transformers, load_checkpoint
from twotower.cli.lm_eval import load_decoder
from twotower.lab.evaluate.lm_harness import make_model_class

pytest.importorskip("accelerate", reason="lm-eval's hf model needs it")
huggingface = pytest.importorskip("lm_eval.models.huggingface")
from lm_eval.api.instance import Instance  # noqa: E402  # not before the skip

TOLERANCE = 2e-4  # sums of float32 logits in another order, over up to 40 tokens
PAIRS = [
    ("The old clock", " stopped at 12:45."),
    ("The old clock ", "stopped at 12:45."),  # the space goes to the continuation
    ("the sil", "ence; the whole house"),  # a token lies across the border
    ("the silence\n\n", "the"),
    ("", "The whole house"),
]

TEMPLATE = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}
{{- raise_exception('no system') }}{% endif %}[{{ m.role }}] {{ m.content | trim }}
{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"""


def instances(kind: str, arguments: list[tuple[str, ...]]) -> list[Instance]:
    return [Instance(kind, {}, asked, place) for place, asked in enumerate(arguments)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, object]:
    """Ours on the checkpoint, lm-eval's `hf` on its export."""
    folder = tmp_path_factory.mktemp("models")
    make_text_checkpoint(folder / "ours")
    (folder / "ours" / "chat_template.jinja").write_text(TEMPLATE)
    export_transformers(load_checkpoint(folder / "ours"), folder / "theirs")
    twotower.load_tokenizer(folder / "ours").save(folder / "theirs")
    ours = make_model_class(load_decoder).create_from_arg_string(
        f"pretrained={folder / 'ours'},mode=ar,batch_size=3", {"device": "cpu"}
    )
    theirs = huggingface.HFLM(
        pretrained=str(folder / "theirs"), device="cpu", dtype="float32", batch_size=2
    )
    return ours, theirs


def test_likelihoods_are_those_of_lm_evals_own_model(models: tuple[object, object]) -> None:
    """Silent failure: another border between context and continuation, or another first token,
    and every published multiple-choice figure differs by a little.
    """
    ours, theirs = models
    found = ours.loglikelihood(instances("loglikelihood", PAIRS))
    spelled = [(f"<bos>{context}" if context else "", text) for context, text in PAIRS]
    wanted = theirs.loglikelihood(instances("loglikelihood", spelled), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([v for v, _ in wanted], abs=TOLERANCE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert found[0] == pytest.approx(found[1])  # where the space is written does not matter


def test_rolling_likelihoods_too(models: tuple[object, object]) -> None:
    ours, theirs = models
    texts = [(TEXT,), ("The house",)]
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    wanted = theirs.loglikelihood_rolling(
        instances("loglikelihood_rolling", texts), disable_tqdm=True
    )
    assert found == pytest.approx(wanted, abs=TOLERANCE)


def test_an_empty_context_is_bos_where_the_tokenizer_does_not_add_it(
    models: tuple[object, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent failure: perplexities of such models (SmolLM2) differ from all published ones."""
    ours, theirs = models
    monkeypatch.setattr(ours.decoder.tokenizer, "adds_bos", False)
    pairs = [("", "The whole house"), ("The old clock", " stopped")]
    found = ours.loglikelihood(instances("loglikelihood", pairs))
    wanted = theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([v for v, _ in wanted], abs=TOLERANCE)


def test_greedy_text_too(models: tuple[object, object]) -> None:
    """Silent failure: a stop string or a limit that lm-eval gives is understood differently."""
    ours, theirs = models
    limits = {"do_sample": False, "temperature": 0.0, "max_gen_toks": 12}
    asked = [("The old clock", {**limits, "until": ["\n\n"]}), ("Nobody", {**limits, "until": []})]
    found = ours.generate_until(instances("generate_until", asked))
    spelled = [(f"<bos>{context}", given) for context, given in asked]
    wanted = theirs.generate_until(instances("generate_until", spelled), disable_tqdm=True)
    assert all(found) and found == wanted


def test_chats_too(models: tuple[object, object]) -> None:
    """Silent failure: another prompt than lm-eval's own model makes of the same few-shot turns."""
    ours, theirs = models
    turns = [
        {"role": "user", "content": " The old clock "},
        {"role": "assistant", "content": "stopped"},
        {"role": "user", "content": "The house"},
    ]
    begun = [*turns, {"role": "assistant", "content": "Answer: "}]
    for chat, asks in (
        (turns, True),
        (begun, False),
        ([{"role": "system", "content": "x"}, *turns], True),
    ):
        text = ours.apply_chat_template(chat, add_generation_prompt=asks)
        assert text == theirs.apply_chat_template(chat, add_generation_prompt=asks)
        pair = [(text, "silence")]
        (found,) = ours.loglikelihood(instances("loglikelihood", pair))
        (wanted,) = theirs.loglikelihood(instances("loglikelihood", pair), disable_tqdm=True)
        assert found[0] == pytest.approx(wanted[0], abs=TOLERANCE) and found[1] == wanted[1]
