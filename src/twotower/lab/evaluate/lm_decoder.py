"""A model that answers the three kinds of requests that lm-eval makes, without lm-eval's types.

Texts are decoded in any mode; likelihoods are the context tower's, for the denoiser has only a
bound.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from twotower.engine import (
    EngineOptions,
    Finished,
    GenerateOptions,
    defaults_of,
    resolve_options,
    stream,
)
from twotower.lab.evaluate.likelihood import Score, score_texts
from twotower.model import TwoTower
from twotower.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
DEFAULT_MAX_TOKENS = 256
# Spellings of lm-eval's own models, the first that is given counts.
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("top_p", "top_k", "min_p")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_KNOWN = {"until", "do_sample", "temperature", *_MAX_TOKENS, *_SAMPLING, *_PENALTIES}
_MOST_CHOICES = 16  # texts after one context that are scored together whatever the batch size
Messages = Sequence[Mapping[str, str]]


class Template(Protocol):
    """The model's chat template."""

    source: str

    def text(self, messages: Messages, continues_last: bool) -> str:
        """A prompt for the reply to messages; continues_last: for the rest of the last one."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A loaded model that answers lm-eval's three kinds of requests, without lm-eval's types."""

    name: str
    model: TwoTower
    tokenizer: Tokenizer
    decoding: GenerateOptions
    batch_size: int
    template: Callable[[], Template]  # ValueError (one line) without one

    def score(
        self, pairs: Sequence[tuple[str, str]], tell: Callable[[int, Score], None] = lambda *_: None
    ) -> list[Score]:
        """Each (context, continuation), in order; an empty context is the tokenizer's bos. tell
        gets each score and its place when it is known.
        """
        encoded = [self._split(context, text) for context, text in pairs]
        nothing = Score(log_likelihood=0.0, is_greedy=True, num_tokens=0)
        scores = {place: nothing for place, (_, scored) in enumerate(encoded) if not scored}
        places = [place for place in range(len(pairs)) if place not in scores]
        for group in _groups(places, [prompt for prompt, _ in encoded], self.batch_size):
            prompts, texts = zip(*(encoded[place] for place in group), strict=True)
            for place, score in zip(group, score_texts(self.model, prompts, texts), strict=True):
                scores[place] = score
                tell(place, score)
        return [scores[place] for place in range(len(pairs))]

    def _split(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """Token ids of both, by lm-eval's own rule, after the bos that generation starts from too.

        White space between them belongs to the continuation; both are encoded as one text, and what
        goes beyond the context's own tokens is scored, or the last one, where both have as many.
        """
        cut = len(context.rstrip())
        prompt = self._prompt(context[:cut])
        both = self._prompt(context + text)
        prompt = prompt[: len(both) - 1] if text else prompt
        return prompt or [self._start()], both[len(prompt) :]

    def _start(self) -> int:
        """What a text without a context follows, as in lm-eval's own models: bos, else eos."""
        for found in (self.tokenizer.bos_id, self.tokenizer.eos_id):
            if found is not None:
                return found
        raise ValueError("lm-eval: an empty context needs a tokenizer with bos or eos")

    def _prompt(self, text: str) -> list[int]:
        """Token ids after bos, where the tokenizer adds it and a chat template has not written it.
        Written forms of special tokens are meant, as in lm-eval's own models.
        """
        ids, bos = self.tokenizer.encode(text, allow_special=True), self.tokenizer.bos_id
        is_missing = self.tokenizer.adds_bos and bos is not None and ids[:1] != [bos]
        return [bos, *ids] if is_missing and bos is not None else ids

    def write(
        self,
        requests: Sequence[tuple[str, dict[str, Any]]],
        tell: Callable[[int, str], None] = lambda *_: None,
    ) -> list[str]:
        """Text after each context, until one of its stop strings. tell gets each text and its place
        when it is whole.
        """
        prompts = [self._prompt(context) or [self._start()] for context, _ in requests]
        options = [self._options(asked) for _, asked in requests]
        engine = EngineOptions(batch_size=self.batch_size)
        texts = [""] * len(requests)
        for event in stream(self.model, prompts, options, self.tokenizer, engine):
            if isinstance(event, Finished):
                texts[event.row] = event.completion.text or ""
                tell(event.row, texts[event.row])
        return texts

    def _options(self, asked: dict[str, Any]) -> GenerateOptions:
        """lm-eval's generation arguments as ours; ValueError for one that we cannot honour."""
        asked = {name: value for name, value in asked.items() if (name, value) != ("num_beams", 1)}
        if unknown := sorted(set(asked) - _KNOWN):
            allowed = ", ".join(sorted(_KNOWN))
            raise ValueError(f"generation_kwargs: {unknown[0]} is not supported; use {allowed}")
        until = asked.get("until") or []
        stop = [text for text in ([until] if isinstance(until, str) else until) if text]
        ends, texts = self._ends(stop)
        limits = [asked[name] for name in _MAX_TOKENS if asked.get(name) is not None]
        given = self.decoding.given() | {
            "max_new_tokens": int(limits[0] if limits else DEFAULT_MAX_TOKENS),
            # Greedy, whatever the checkpoint's own default is.
            "temperature": 0.0,
        }
        if texts:
            given["stop"] = texts
        if ends:
            usual = resolve_options(GenerateOptions(**given), defaults_of(self.model)).eos_token_id
            given["eos_token_id"] = (*usual, *ends)
        temperature, is_sampled = asked.get("temperature"), asked.get("do_sample")
        if (temperature or 0.0) > 0.0 if is_sampled is None else is_sampled:
            given["temperature"] = 1.0 if temperature is None else float(temperature)
            given |= {name: asked[name] for name in _SAMPLING if name in asked}
        given |= {name: asked[name] for name in _PENALTIES if name in asked}
        return GenerateOptions(**given)

    def _ends(self, stop: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Stop strings that are one special token, which no text shows, as ids; and the others."""
        ids = {text: self.tokenizer.encode(text, allow_special=True) for text in stop}
        special = {t for t, i in ids.items() if len(i) == 1 and i[0] in self.tokenizer.special_ids}
        return tuple(ids[t][0] for t in stop if t in special), tuple(
            t for t in stop if t not in special
        )

    def chat(self, messages: Messages, continues_last: bool) -> str:
        """A chat as a prompt. Where the template refuses a system message, it is left out."""
        template = self.template()
        try:
            return template.text(messages, continues_last)
        except ValueError as error:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise
            _log.warning("%s; asked again without the system message", error)
            return template.text(others, continues_last)


def _groups(
    places: Sequence[int], prompts: Sequence[list[int]], batch_size: int
) -> Iterator[list[int]]:
    """Places of prompts that are scored together: those of one that has several texts by
    themselves, others by length, the longest first.
    """
    same: dict[tuple[int, ...], list[int]] = {}
    for place in sorted(places, key=lambda place: -len(prompts[place])):
        same.setdefault(tuple(prompts[place]), []).append(place)
    alone = [own[0] for own in same.values() if len(own) == 1]
    for own, most in ((alone, batch_size), *((one, _MOST_CHOICES) for one in same.values())):
        if own is alone or len(own) > 1:
            yield from (own[start : start + most] for start in range(0, len(own), most))
