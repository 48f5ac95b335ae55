"""What else could run the same weights: greedy decoding by transformers and by llama.cpp.

Decides how each is called and which of its times count; `run` decides what is compared.
Each runs in this process, reads the context tower alone and keeps no cache between calls.
"""

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from twotower.checkpoint import export_transformers
from twotower.checkpoint.gguf import Precision, export_gguf
from twotower.model import TwoTower

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {
    "F32": "float32", "BF16": "bfloat16", "F16": "float16", "Q8_0": "q8_0", "Q4_0": "q4_0",
}  # fmt: skip
LLAMA_CPP_DTYPES: tuple[Precision, ...] = ("float32", "float16", "q8_0")
_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_QUANTIZATIONS = {
    "F32": "none", "BF16": "none", "F16": "none", "Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4",
}  # fmt: skip
SPECULATIONS = ("ngram-simple", "ngram-map-k", "ngram-mod")  # of llama.cpp, without a draft model
_LOOKUP_TOKENS = 10  # of transformers' prompt lookup
_CONTEXT = 4096  # tokens of a prompt and what is written after it


class MissingBaseline(ValueError):
    """A baseline's library is not installed; the message says how to get it."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """New tokens after one prompt, the end token included when it was reached, and their cost.

    Decoding begins when the first token is known (block modes: when the prompt is read) and yields
    `decode_tokens` tokens.
    """

    tokens: list[int]
    seconds: float
    decode_seconds: float
    decode_tokens: int
    nfe: int
    context_forwards: int

    @classmethod
    def of_ar(cls, tokens: list[int], prompt_s: float, decode_s: float) -> "Measurement":
        """Of decoding token by token; prompt_s: until the first one is known."""
        return cls(
            tokens=tokens,
            seconds=prompt_s + decode_s,
            decode_seconds=decode_s,
            decode_tokens=len(tokens) - 1,
            nfe=0,
            context_forwards=len(tokens),
        )

    @property
    def ms_per_token(self) -> float:
        """From the prompt to the last token, by tokens."""
        return 1e3 * self.seconds / max(1, len(self.tokens))

    @property
    def decode_ms_per_token(self) -> float | None:
        """Without prefill; None where that was all."""
        return 1e3 * self.decode_seconds / self.decode_tokens if self.decode_tokens else None


def llama_cpp_name(dtype: str) -> str:
    """What the table calls llama.cpp with weights of a precision."""
    return f"llama.cpp-{_SHORT.get(dtype, dtype)}"


class Transformers:
    """transformers' own class of the family, in plain PyTorch on the CPU with its own cache."""

    name = "transformers"

    def __init__(
        self, folder: Path, threads: int, dtype: str = "float32", lookup: bool = False
    ) -> None:
        """folder: of `export_transformers`; dtype: auto is the folder's; lookup: with its prompt
        lookup. MissingBaseline when it is not installed.
        """
        try:
            from transformers import AutoModelForCausalLM, logging
        except ImportError:
            raise _missing("transformers") from None
        # Its bar of loading and its notes on kernels would stand between our own lines.
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self.dtype = dtype
        self._threads = threads
        self._lookup = {"prompt_lookup_num_tokens": _LOOKUP_TOKENS} if lookup else {}
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        self._model = model.eval()

    def decode(self, ids: Sequence[int], num_new: int) -> Measurement:
        """Continue a prompt of token ids until the model's end token or `num_new` tokens."""
        stopwatch = _Stopwatch()
        prompt = torch.tensor([list(ids)])
        with _torch_threads(self._threads), torch.inference_mode():
            found = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=num_new,
                do_sample=False,
                streamer=stopwatch,
                **self._lookup,
            )
        start, first, last = (stopwatch.seconds[index] for index in (0, 1, -1))
        return Measurement.of_ar(found[0, len(ids) :].tolist(), first - start, last - first)

    def close(self) -> None:
        """Free its memory."""
        del self._model


class _Stopwatch:
    """Notes when `generate` hands over the prompt, and then each new token."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: "Tensor") -> None:
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        pass


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class LlamaCpp:
    """llama.cpp's own server inside this process.

    A float32 file gets a float32 KV cache and plain attention, which is exact; others run as
    llama.cpp does by default.
    """

    def __init__(
        self, file: Path, threads: int, speculation: str = "plain", context: int = _CONTEXT
    ) -> None:
        """file: of `export_gguf`; speculation: plain, or one of SPECULATIONS with its own defaults;
        context: the most tokens of a prompt and what is written after it. MissingBaseline when it
        is not installed; ValueError for a bad file.
        """
        try:
            import xllamacpp
        except ImportError:
            raise _missing("xllamacpp") from None
        self.dtype, self._has_end = _read_header(file)
        self.name, self._context = llama_cpp_name(self.dtype), context
        try:
            options = _server_options(file, threads, self.dtype, context)
            if speculation != "plain":
                kinds = xllamacpp.common_speculative_type
                name = f"COMMON_SPECULATIVE_TYPE_{speculation.upper().replace('-', '_')}"
                options.speculative.types = [getattr(kinds, name)]
            self._server = xllamacpp.Server(options)
        except RuntimeError:
            raise ValueError(f"{file}: llama.cpp cannot load it; its reason stands above") from None
        self._address = self._server.listening_address.removeprefix("http://")
        # A server that is closed before its loop runs waits for the loop's end for ever.
        self._complete([0], 1)

    def decode(self, ids: Sequence[int], num_new: int) -> Measurement:
        """Greedy tokens behind a prompt, and what its own clock says of both."""
        answer = self._complete(ids, num_new)
        # Its clock of decoding starts when the first new token has been chosen.
        prompt_ms, decode_ms = (answer["timings"][f"{name}_ms"] for name in ("prompt", "predicted"))
        return Measurement.of_ar(answer["tokens"], prompt_ms / 1000, decode_ms / 1000)

    def close(self) -> None:
        """End the server."""
        del self._server

    def _complete(self, ids: Sequence[int], num_new: int, **more: int) -> dict[str, Any]:
        """The answer of llama.cpp's own completion endpoint: only that one gives token ids back."""
        if len(ids) + num_new > self._context:
            raise ValueError(
                f"prompt of {len(ids)} tokens and num_new={num_new} exceed the "
                f"{self._context} tokens that llama.cpp was given; ask for fewer"
            )
        request = {
            "prompt": list(ids),
            "n_predict": num_new,
            "temperature": 0,
            "cache_prompt": False,
            "ignore_eos": not self._has_end,
            "return_tokens": True,
            **more,
        }
        connection = http.client.HTTPConnection(self._address)
        try:
            connection.request(
                "POST", "/completion", json.dumps(request), {"Content-Type": "application/json"}
            )
            answer = json.load(connection.getresponse())
        finally:
            connection.close()
        if "error" in answer:
            raise ValueError(f"llama.cpp: {answer['error'].get('message', answer['error'])}")
        found: dict[str, Any] = answer
        return found


Baseline = Transformers | LlamaCpp


def _server_options(file: Path, threads: int, dtype: str, context: int) -> Any:
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(file)
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    options.n_ctx = context
    options.n_parallel = 1
    options.n_gpu_layers = 0
    options.fit_params = False
    options.ui = False
    options.verbosity = 1  # errors only
    if dtype == "float32":
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.flash_attn_type = off
    return options


def _missing(package: str) -> MissingBaseline:
    return MissingBaseline(f'{package} is not installed: pip install ".[bench]"')


def gguf_quantization(file: Path) -> str | None:
    """none (full or half precision), int8 or int4: of a GGUF file's matrices; None for others."""
    name = _read_header(file)[0]
    return {_DTYPES.get(kind, kind): own for kind, own in _QUANTIZATIONS.items()}.get(name)


def _read_header(file: Path) -> tuple[str, bool]:
    """A GGUF file's precision, and whether its model has an end token.

    Where it has none, `export_gguf` names the mask token. ValueError (one line) for another file.
    """
    try:
        from gguf import GGUFReader, LlamaFileType
    except ImportError:
        raise _missing("gguf") from None
    try:
        fields = GGUFReader(file).fields
        kind = LlamaFileType(fields["general.file_type"].contents())
        end, mask = (
            fields[key].contents() if (key := f"tokenizer.ggml.{role}_token_id") in fields else None
            for role in ("eos", "mask")
        )
    except (OSError, ValueError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{file}: not a GGUF file of a language model ({reason}); write one with "
            "twotower convert --to gguf"
        ) from None
    name = kind.name.removeprefix("ALL_").removeprefix("MOSTLY_")
    return _DTYPES.get(name, name), end != mask


@contextmanager
def open_baselines(
    model: TwoTower | None, threads: int, dtype: torch.dtype
) -> Iterator[tuple[list[Baseline], list[str]]]:
    """Baselines on the weights of the context tower, and a line for each that cannot run.

    The files they need are written for them and removed with them. None: none are wanted.
    """
    baselines: list[Baseline] = []
    missing: list[str] = []
    with TemporaryDirectory(prefix="twotower-bench-") as folder:
        try:
            if model is not None:
                _open_all(model, Path(folder), (threads, dtype), baselines, missing)
            yield baselines, missing
        finally:
            for baseline in baselines:
                baseline.close()


def _open_all(
    model: TwoTower,
    folder: Path,
    how: tuple[int, torch.dtype],
    baselines: list[Baseline],
    missing: list[str],
) -> None:
    threads, dtype = how
    try:
        export_transformers(model, folder / "transformers")
        name = str(dtype).removeprefix("torch.")
        baselines.append(Transformers(folder / "transformers", threads, name))
    except ValueError as error:  # not installed, or a model that it cannot represent
        missing.append(f"transformers: {error}")
    for kind in LLAMA_CPP_DTYPES:
        file = folder / f"{kind}.gguf"
        try:
            export_gguf(model, file, dtype=kind)
            baselines.append(LlamaCpp(file, threads))
        except ValueError as error:
            missing.append(f"{llama_cpp_name(kind)}: {error}")
