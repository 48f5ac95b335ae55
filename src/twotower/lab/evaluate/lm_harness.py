"""lm-eval runs its tasks on our models: `twotower lm-eval --model twotower --model_args ...`.

The only file that knows lm_eval. `generate_until` decodes in any mode; likelihoods are the context
tower's, for the denoiser has only a bound.
"""

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from twotower.engine import GenerateOptions, generate
from twotower.engine.options import MODES
from twotower.lab.evaluate.likelihood import Score, score_texts
from twotower.model import TwoTower
from twotower.tokenizer import Tokenizer

MODEL_NAME = "twotower"
DEFAULT_MAX_TOKENS = 256
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """What `--model_args` may name."""

    pretrained: str | None = None
    """Checkpoint folder or hub id; the shipped model when not given."""
    mode: str | None = None
    """Decoding mode of generate_until; the checkpoint's own when not given."""
    dtype: str = "float32"
    context_device: str = "cpu"
    denoiser_device: str = "cpu"
    batch_size: int = 1
    confidence_threshold: float | None = None
    steps_per_block: int | None = None
    review_threshold: float | None = None
    seed: int = 0

    @classmethod
    def from_arguments(cls, values: dict[str, Any]) -> "HarnessOptions":
        """ValueError for an unknown name (with the nearest known one) or an impossible value."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"model_args: {name} is unknown; the nearest is {near}")
        options = cls(**values)
        if options.mode is not None and options.mode not in MODES:
            raise ValueError(f"model_args: mode={options.mode!r} must be one of {', '.join(MODES)}")
        if options.dtype not in DTYPES:
            raise ValueError(
                f"model_args: dtype={options.dtype!r} must be one of {', '.join(DTYPES)}"
            )
        if type(options.batch_size) is not int or options.batch_size < 1:
            raise ValueError(f"model_args: batch_size={options.batch_size!r} must be 1 or more")
        return options


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A loaded model that answers lm-eval's three kinds of requests, without lm-eval's types."""

    model: TwoTower
    tokenizer: Tokenizer
    options: HarnessOptions

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Each (context, continuation), in order; an empty context is the tokenizer's bos."""
        encoded = [self._split(context, text) for context, text in pairs]
        scores: list[Score] = []
        for start in range(0, len(encoded), self.options.batch_size):
            group = encoded[start : start + self.options.batch_size]
            scores += score_texts(self.model, [p for p, _ in group], [t for _, t in group])
        return scores

    def _split(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """Token ids of both, by lm-eval's own rule, after the bos that generation starts from too.

        White space between them belongs to the continuation; both are encoded as one text, and what
        goes beyond the context's own tokens is scored. Without a context eos can stand for bos.
        """
        tokenizer = self.tokenizer
        cut = len(context.rstrip())
        prompt = tokenizer.encode(context[:cut])
        scored = tokenizer.encode(context + text)[len(prompt) :]
        start = tokenizer.eos_id if tokenizer.bos_id is None and not prompt else tokenizer.bos_id
        return ([] if start is None else [start]) + prompt, scored

    def write(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Text after each context, until one of its stop strings."""
        texts: list[str] = []
        for start in range(0, len(requests), self.options.batch_size):
            group = requests[start : start + self.options.batch_size]
            options = [self._options(asked) for _, asked in group]
            done = generate(self.model, [text for text, _ in group], options, self.tokenizer)
            texts += [completion.text or "" for completion in done]
        return texts

    def _options(self, asked: dict[str, Any]) -> GenerateOptions:
        """lm-eval's generation arguments as ours; ValueError for one that we cannot honour."""
        known = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
        if unknown := sorted(set(asked) - known):
            allowed = ", ".join(sorted(known))
            raise ValueError(f"generation_kwargs: {unknown[0]} is not supported; use {allowed}")
        until = asked.get("until") or []
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        given: dict[str, Any] = {
            "max_new_tokens": int(asked.get("max_gen_toks", DEFAULT_MAX_TOKENS)),
            "seed": self.options.seed,
            "stop": stop or None,
        }
        if asked.get("do_sample", asked.get("temperature", 0.0) > 0.0):
            given["temperature"] = float(asked.get("temperature", 1.0))
            given |= {name: asked[name] for name in ("top_p", "top_k") if name in asked}
        mine = ("mode", "confidence_threshold", "steps_per_block", "review_threshold")
        given |= {n: v for n in mine if (v := getattr(self.options, n)) is not None}
        return GenerateOptions(**given)


Load = Callable[[HarnessOptions], Decoder]


def make_model_class(load: Load) -> type:
    """The lm_eval model class."""
    from lm_eval.api.model import LM

    class TwoTowerLM(LM):  # type: ignore[misc]  # lm_eval has no types
        """lm-eval's requests answered by a Decoder."""

        def __init__(self, decoder: Decoder) -> None:
            super().__init__()
            self.decoder = decoder

        @classmethod
        def create_from_arg_obj(
            cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
        ) -> "TwoTowerLM":
            extra = {n: v for n, v in (additional_config or {}).items() if v is not None}
            values = {"batch_size": int(extra.get("batch_size", 1)), **arg_dict}
            # lm-eval's own default is a GPU: without one it is no wish of the user's.
            if (device := str(extra.get("device", "cpu"))) != "cpu" and torch.cuda.is_available():
                values = {"context_device": device, "denoiser_device": device, **values}
            return cls(load(HarnessOptions.from_arguments(values)))

        @classmethod
        def create_from_arg_string(
            cls, arg_string: str, additional_config: dict[str, Any] | None = None
        ) -> "TwoTowerLM":
            from lm_eval.utils import simple_parse_args_string

            return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            scores = self.decoder.score([request.args for request in requests])
            return [(score.log_likelihood, score.is_greedy) for score in scores]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            scores = self.decoder.score([("", request.args[0]) for request in requests])
            return [score.log_likelihood for score in scores]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return self.decoder.write([request.args for request in requests])

        def apply_chat_template(self, *args: object, **kwargs: object) -> str:
            raise ValueError("chat templates are not supported; leave out --apply_chat_template")

    return TwoTowerLM


def register(load: Load) -> None:
    """Make `--model twotower` known to lm-eval in this process; ImportError says what to install.

    lm-eval looks for no plug-ins: whoever wants the name calls this before lm-eval asks for it.
    """
    try:
        from lm_eval.api.registry import model_registry, register_model
    except ImportError:
        raise ImportError('lm_eval is not installed: pip install "twotower[lm-eval]"') from None

    if MODEL_NAME not in model_registry:
        register_model(MODEL_NAME)(make_model_class(load))


def run_harness(arguments: Sequence[str]) -> None:
    """lm-eval's own command line with these arguments."""
    from lm_eval._cli import HarnessCLI

    previous, sys.argv = sys.argv, ["lm-eval", *arguments]  # its sub-commands read sys.argv
    try:
        harness = HarnessCLI()
        harness.execute(harness.parse_args())
    finally:
        sys.argv = previous
