"""`twotower lm-eval`: lm-eval's own command line, with our models and tasks known to it."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

from twotower.arguments import nearest
from twotower.cli.measuring import say_protection
from twotower.cli.progress import load_with_bar
from twotower.cli.serve import need_extra, template_of
from twotower.engine import EngineOptions, GenerateOptions
from twotower.lab.evaluate.lm_decoder import Decoder, Messages
from twotower.lab.evaluate.lm_harness import register, run_harness, write_tasks
from twotower.lab.evaluate.sandbox import find_sandbox
from twotower.loading import Loaded, Placement

USAGE = """usage: twotower lm-eval --write-tasks FOLDER [--items N] [--seed N]
       twotower lm-eval LM_EVAL_ARGUMENTS ...

The first form writes the suite as lm-eval tasks. The second is lm-eval itself, which then knows
--model twotower (--model_args pretrained=PATH,mode=diffusion; the shipped model without
pretrained) and, with --include_path FOLDER, the group twotower_mini.
twotower lm-eval run --help shows lm-eval's own options."""
# The other options are those of each task.
_DECODING = {
    "mode", "block_size", "steps_per_block", "first_token", "verify_threshold", "drafts",
    "draft_passes", "confidence_threshold", "schedule", "remask", "adaptive", "seed",
}  # fmt: skip
_VARIABLES = ("enable_thinking",)  # of chat templates


def run_arguments(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit status. Errors of the user arrive as ValueError."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] == "--write-tasks":
        return _write(arguments[1:])
    register(load_decoder)
    if "--confirm_run_unsafe_code" in arguments:
        say_protection(find_sandbox(allow_unsandboxed=True))
    run_harness(arguments)
    return 0


def _write(arguments: Sequence[str]) -> int:
    folder, *flags = arguments or [""]
    values = {"--items": 200, "--seed": 0}
    for flag, value in zip(flags[::2], [*flags[1::2], ""], strict=False):
        if flag not in values or not value.isdigit():
            raise ValueError(f"lm-eval: {flag} {value} is not --items N or --seed N")
        values[flag] = int(value)
    if not folder or folder.startswith("-") or values["--items"] < 1:
        raise ValueError("lm-eval: --write-tasks needs a folder, and --items 1 or more")
    for path in write_tasks(Path(folder), values["--items"], values["--seed"]):
        print(path)
    return 0


def load_decoder(values: Mapping[str, Any]) -> Decoder:
    """Load the model that `--model_args` names; ValueError (one line) if it cannot be."""
    placement, decoding, batch_size = read_model_args(values)
    variables = {name: values[name] for name in _VARIABLES if name in values}
    loaded = load_with_bar(placement, decoding.mode)
    return Decoder(
        name=loaded.name,
        model=loaded.model,
        tokenizer=loaded.need_tokenizer(),
        decoding=decoding,
        batch_size=batch_size,
        template=cache(partial(_Template, loaded, variables)),
    )


def read_model_args(values: Mapping[str, Any]) -> tuple[Placement, GenerateOptions, int]:
    """Where the model is, how it decodes, and how many rows at a time. ValueError (one line) for an
    unknown name (with the nearest known one) or an impossible value.
    """
    places = {field.name for field in fields(Placement)} - {"model"}
    known = ["pretrained", *sorted(places | _DECODING | {"batch_size", *_VARIABLES})]
    for name in values:
        if name not in known:
            raise ValueError(
                f"model_args: {name} is unknown{nearest(name, known)}; known are {', '.join(known)}"
            )
    # lm-eval reads numbers where it can, also in a path or a revision.
    where = {n: v if n == "threads" else str(v) for n, v in values.items() if n in places}
    if "pretrained" in values:
        where["model"] = str(values["pretrained"])
    rows = str(values.get("batch_size", 1))  # lm-eval's own flag comes as text
    try:
        placement = Placement(**where)  # type: ignore[arg-type]  # checked there, as all others
        decoding = GenerateOptions(**{n: v for n, v in values.items() if n in _DECODING})
        engine = EngineOptions()
        if rows.partition(":")[0] != "auto":
            engine = EngineOptions(batch_size=int(rows) if rows.isdecimal() else rows)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"model_args: {error}") from None
    return placement, decoding, engine.batch_size


class _Template:
    """A model's chat template and the process that renders it."""

    def __init__(self, loaded: Loaded, variables: Mapping[str, object]) -> None:
        with need_extra("lm-eval"):
            found = template_of(loaded, None, variables)
        if found is None:
            raise ValueError(
                f"apply_chat_template: {loaded.name} has no chat template; leave the flag out"
            )
        self.source, self._template = found.source, found
        self._process = found.process(loaded.need_tokenizer())

    def text(self, messages: Messages, continues_last: bool) -> str:
        """See `Template`."""
        from twotower.serve.chat import Manner
        from twotower.serve.errors import ApiError

        manner = Manner(continues_last=continues_last)
        try:
            return self._template.text(messages, self._process, manner)
        except ApiError as error:
            raise ValueError(error.message) from None
