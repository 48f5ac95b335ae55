"""The helpers of the `openai` package, and what its users and those of frameworks send."""

import dataclasses
import json
from typing import Any

import httpx
import openai
import pytest
from openai.types import completion_create_params as of_completions
from openai.types.chat import completion_create_params as of_chat
from openai.types.responses import response_create_params as of_responses

from asked import ARGUMENTS, ASK, BODIES, NUMBER, ORDER, SPANISH, SUM, TOOL, City, post
from serving import Running, shipped
from twotower.cli.serve import describe
from twotower.engine import GenerateOptions, Request, Worker, generate
from twotower.loading import Placement, load
from twotower.serve.api_fields import UNSERVED, WITHOUT_EFFECT
from twotower.serve.requests import Reader
from twotower.serve.schema import CompletionRequest, validated


@pytest.mark.parametrize(
    ("path", "published"),
    [
        ("/v1/completions", of_completions.CompletionCreateParamsBase),
        ("/v1/chat/completions", of_chat.CompletionCreateParamsBase),
        ("/v1/responses", of_responses.ResponseCreateParamsBase),
    ],
)
def test_every_published_field_is_known(path: str, published: type) -> None:
    """Guards the table: a field that the API gets would be refused with a hint at another one."""
    record, _ = BODIES[path]
    known = {field.alias or name for name, field in record.model_fields.items()}
    fields = set(published.__annotations__)
    assert fields - known - record.unserved == set()
    more = {"store", "metadata"} if path == "/v1/completions" else set()
    assert record.unserved - fields == more and not record.unserved & known
    assert record.unserved <= set(UNSERVED) | WITHOUT_EFFECT


@pytest.mark.parametrize("path", BODIES)
def test_values_that_ask_for_nothing_pass_and_others_are_refused(
    path: str, server: Running
) -> None:
    record, body = BODIES[path]
    nothing = {"logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "stop": ""}
    nothing |= {"tools": [], "tool_choice": "auto", "top_logprobs": 0, "logprobs": None}
    nothing |= {"stream_options": {"include_usage": False}, "repetition_penalty": 1, "min_p": 0}
    known = {name: value for name, value in nothing.items() if name in record.model_fields}
    answer = post(server, path, **body, **known, mode="diffusion")
    assert answer.status_code == 200, answer.text
    if path == "/v1/completions":
        assert post(server, path, **body, logprobs=False).json()["choices"][0]["logprobs"] is None
    fields = dict.fromkeys([*record.model_fields, *record.unserved])
    assert post(server, path, **{**fields, **body}).status_code == 200
    for name in record.unserved & set(UNSERVED):
        for value in (None, False, [], {}, {"effort": None}, *UNSERVED[name].neutral):
            answer = post(server, path, **body, **{name: value})
            is_asked = isinstance(value, dict) and name == "web_search_options"
            assert answer.status_code == (400 if is_asked else 200), (name, value, answer.text)
        error = post(server, path, **body, **{name: "mango"}).json()["error"]
        assert error["code"] == "unsupported_field" and error["param"] == name
        assert error["message"] == f"{name} is not supported: {UNSERVED[name].reason}"
    for name in record.unserved & WITHOUT_EFFECT:
        assert post(server, path, **body, **{name: {"a": "b"}}).status_code == 200


def test_an_answer_of_each_helper_goes_back_in(client: openai.OpenAI) -> None:
    """Guards a conversation: what `parse` and `stream` add to a message was refused."""
    parsed = client.chat.completions.parse(model="twotower", messages=ASK, response_format=City)
    first = parsed.choices[0].message
    assert first.parsed is not None and first.parsed.city in ("Paris", "Rome")
    order: list[Any] = [{"role": "user", "content": ORDER}]
    with client.chat.completions.stream(model="twotower", messages=order, tools=[TOOL]) as stream:
        kinds = [event.type for event in stream]
        second = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    assert second.tool_calls is not None
    assert json.loads(second.tool_calls[0].function.arguments) == ARGUMENTS
    result = {"role": "tool", "tool_call_id": second.tool_calls[0].id, "content": "ordered"}
    for history in ([first], [first.model_dump()], [second, result], [second.model_dump(), result]):
        turns: list[Any] = [*order, *history, *ASK]
        client.chat.completions.create(model="twotower", messages=turns, max_tokens=2)


KEPT: list[dict[str, Any]] = [
    {"role": "assistant", "content": "x", "reasoning_content": "y", "refusal": None, "audio": None},
    {"role": "assistant", "content": "x", "annotations": [{"type": "url_citation"}], "id": "5"},
    {"role": "assistant", "content": None, "refusal": "no"},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "y", "signature": "z"}]},
    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}},
    {"role": "assistant", "content": None, "audio": {"id": "a"}, "tool_calls": []},
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": [], "tool_calls": None},
    {"role": "function", "name": "f", "content": "1"},
    {"role": "tool", "tool_call_id": "c", "content": None},
    {
        "role": "user",
        "name": "Ann",
        "content": [{"type": "text", "text": "a", "cache_control": {}}],
    },
    {
        "role": "assistant",
        "tool_calls": [{"index": 0, "function": {"name": "f", "arguments": {"a": 1}}}],
        "provider_specific_fields": {},
    },
    {
        "role": "assistant",
        "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}}],
    },
]


@pytest.mark.parametrize("message", KEPT, ids=lambda message: ",".join(message)[:60])
def test_what_clients_keep_of_a_message_is_taken(message: dict[str, Any], server: Running) -> None:
    answer = post(server, "/v1/chat/completions", messages=[*ASK, message, *ASK], max_tokens=2)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "type 'image_url'"),
        ({"role": "user"}, "messages.0.content: is missing"),
        ({"role": "robot", "content": "x"}, "messages.0.role"),
    ],
)
def test_what_a_text_model_cannot_read_is_refused(
    message: dict[str, Any], said: str, server: Running
) -> None:
    answer = post(server, "/v1/chat/completions", messages=[message])
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({"presence_penalty": 0.5}, "speculative"),
        ({"logit_bias": {"5": 1}}, "speculative"),
        ({"response_format": {"type": "json_object"}}, "speculative"),
        ({"presence_penalty": 0, "logit_bias": {}, "min_p": 0.1}, "diffusion"),
    ],
)
def test_what_the_default_mode_cannot_keep_chooses_another(
    given: dict[str, Any], mode: str, server: Running
) -> None:
    served = dataclasses.replace(server.service.served, default_mode="diffusion")
    reader = Reader(served, server.service.options)
    body = {"prompt": "a", "temperature": 0.5, **given}
    assert reader.completion(validated(CompletionRequest, body)).mode == mode


def test_penalties_reach_the_engine_and_choose_a_mode_that_has_them(
    client: openai.OpenAI,
) -> None:
    loaded = shipped()
    shape: dict[str, Any] = {"frequency_penalty": 1.5, "presence_penalty": 0.5}
    ours = {"repetition_penalty": 1.2, "logit_bias": {"300": -100}, "min_p": 0.1, "seed": 3}
    answer = client.completions.create(
        model="twotower", prompt=SUM, max_tokens=24, temperature=0.7, **shape, extra_body=ours
    )
    options = GenerateOptions(mode="ar", max_new_tokens=24, temperature=0.7, **shape, **ours)  # type: ignore[arg-type]
    (expected,) = generate(loaded.model, [SUM], options, loaded.tokenizer)
    assert answer.choices[0].text == expected.text


@pytest.mark.parametrize("num_new", [0, 3])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_echo_scores_the_prompt(num_new: int, is_streamed: bool, client: openai.OpenAI) -> None:
    """What lm-eval asks for: the log-probability of each token of a given text. Guards a shift by
    one, pieces in which the text is read, and choices that take each other's prompts.
    """
    prompts = [SUM * 6, "Q: a"]
    asked: dict[str, Any] = {"model": "twotower", "prompt": prompts, "echo": True, "logprobs": 2}
    asked |= {"max_tokens": num_new, "extra_body": {"mode": "ar", "ignore_eos": True}, "n": 2}
    if is_streamed:
        texts, shown = ["", "", "", ""], [[], [], [], []]  # type: ignore[var-annotated]
        for chunk in client.completions.create(**asked, stream=True):
            choice = chunk.choices[0]
            texts[choice.index] += choice.text
            lists = choice.logprobs and choice.logprobs.model_dump()
            shown[choice.index] += zip(*lists.values(), strict=True) if lists else []
    else:
        choices = client.completions.create(**asked).choices
        texts = [choice.text for choice in choices]
        shown = [list(zip(*c.logprobs.model_dump().values(), strict=True)) for c in choices]  # type: ignore[union-attr]
    loaded = shipped()
    assert loaded.tokenizer is not None
    for index, (text, rows) in enumerate(zip(texts, shown, strict=True)):
        prompt = prompts[index // 2]
        ids = loaded.tokenizer.encode_prompt(prompt)
        assert text.startswith(prompt) and len(rows) == len(ids) + num_new
        offsets, logprobs, tokens, tops = zip(*rows, strict=True)
        assert tokens[0] == "<bos>" and logprobs[0] is None and tops[0] is None
        assert "".join(tokens[1:]) == text
        assert list(offsets[1:]) == [len("".join(tokens[1:n])) for n in range(1, len(tokens))]
        expected = scores(ids)
        assert list(logprobs[1 : len(ids)]) == pytest.approx(expected, abs=1e-3)
        assert all(len(top) == 2 for top in tops[1:])


def test_lm_eval_reads_its_log_likelihoods(server: Running) -> None:
    """What its `local-completions` sends and reads."""
    reader = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    tokenizer = shipped().tokenizer
    assert tokenizer is not None
    context = tokenizer.encode_prompt(f"Q: {SPANISH}\nA:")
    for text, is_greedy in ((f" {NUMBER}", True), (" no idea", False)):
        ids = context + tokenizer.encode(text)
        body = {"prompt": [ids], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
        answer = post(server, "/v1/completions", **body, echo=True).json()
        ((found, was_greedy),) = reader.parse_logprobs(answer, ctxlens=[len(context)])
        assert found == pytest.approx(sum(scores(ids)[len(context) - 1 :]), abs=1e-2)
        assert was_greedy == is_greedy


def scores(ids: list[int]) -> list[float]:
    """Log-probabilities of a text's tokens from the second on, in one pass."""
    import torch

    with torch.no_grad():
        logits = shipped().model.context_logits(torch.tensor([ids]))[0].float().log_softmax(-1)
    return [float(logits[place, token]) for place, token in enumerate(ids[1:])]


def test_a_usage_chunk_is_announced_by_null(client: openai.OpenAI, server: Running) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        body = {**BODIES[path][1], "stream": True, "stream_options": {"include_usage": True}}
        lines = post(server, path, **body).text.splitlines()
        records = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert [record["usage"] is None for record in records] == [True] * (len(records) - 1) + [
            False
        ]
        assert records[-1]["choices"] == []
        plain = post(server, path, **{**BODIES[path][1], "stream": True}).text
        assert '"usage"' not in plain


def test_the_card_tells_defaults_of_what_can_be_asked_for() -> None:
    """Silent failure: a client offers passes and thresholds of a denoiser that is not there, and
    each request with one is refused.
    """
    both, alone = (describe(load(Placement(), mode)).card()["twotower"] for mode in (None, "ar"))
    assert isinstance(both, dict) and isinstance(alone, dict)
    assert alone["modes"] == ["speculative", "ar"]
    assert {*alone["defaults"]} == {"max_new_tokens", "temperature", "drafts", "block_size"}
    of_denoisers = {"draft_passes", "steps_per_block", "first_token", "confidence_threshold"}
    assert {*both["defaults"]} == {*alone["defaults"], *of_denoisers, "verify_threshold"}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/twotower", "/health", "/metrics", "/"])
def test_head_is_answered_as_get_without_a_body(path: str, server: Running) -> None:
    head, get = httpx.head(f"{server.url}{path}"), httpx.get(f"{server.url}{path}")
    assert head.status_code == get.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    assert httpx.head(f"{server.url}/v1/completions").status_code == 405


def test_given_rows_share_passes_with_others() -> None:
    """Guards the engine: rows that are scored beside rows that write, and leave at their ends."""
    loaded = shipped()
    assert loaded.tokenizer is not None
    worker = Worker(loaded.model, loaded.tokenizer)
    worker.start()
    try:
        texts = [loaded.tokenizer.encode_prompt(SUM * n) for n in (1, 5, 2)]
        options = GenerateOptions(mode="ar", logprobs=0, ignore_eos=True)
        rows = [Request(ids[:1], options, given=tuple(ids[1:])) for ids in texts]
        tickets = [worker.submit(one) for one in [*rows, Request(SUM, GenerateOptions(mode="ar"))]]
        ended = [list(ticket.events())[-1].completion for ticket in tickets]  # type: ignore[union-attr]
    finally:
        worker.stop(0)
    for ids, completion in zip(texts, ended, strict=False):
        found = [one.logprob for one in completion.logprobs or ()]
        assert completion.tokens == ids[1:] and found == pytest.approx(scores(ids), abs=1e-3)
    (alone,) = generate(loaded.model, [SUM], GenerateOptions(mode="ar"), loaded.tokenizer)
    assert ended[-1].text == alone.text
