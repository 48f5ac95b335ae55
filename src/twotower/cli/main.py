"""The `twotower` command: finds the verb, runs it, and turns what goes wrong into an exit status.

Status 0 is success, 2 the user's error (one line on stderr), 1 ours, 130 Ctrl-C, 3 a file that was
answered but for lines that were no request. A verb is a module
of this package with `run(options) -> int`; it is imported only when it is called for, so that help
does not wait for torch.
"""

import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO, get_type_hints

from twotower.cli.flags import name_flags
from twotower.cli.parse import parse
from twotower.cli.text import one_line

VERBS = {
    "demo": "watch the shipped model fill blocks, beside the same text token by token",
    "generate": "complete prompts from arguments, a file or stdin",
    "serve": "run a server with OpenAI's API and a page that shows its blocks",
    "chat": "talk with a model in the terminal, on a server or in this process",
    "inspect": "show architecture, parameters and memory; reads no weights",
    "plan": "estimate memory, speed and cost of a model on a machine",
    "convert": "write a checkpoint in another layout or dtype",
    "prepare": "turn text into a tokenizer and a token shard for training",
    "train": "pretrain a backbone, then its denoiser",
    "adapt": "train a thin denoiser for your model: it drafts, your model verifies",
    "bench": "measure the speed of each mode against AR decoding by us and other engines",
    "evaluate": "measure quality and speed of a checkpoint by task and mode",
    "lm-eval": "run lm-eval's tasks on a checkpoint, or write our suite as its tasks",
}
_INTERRUPTED, _BROKEN_PIPE = 130, 141  # 128 + the signal's number, as a shell reports it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (sys.argv's when None); returns the exit status and raises nothing."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    is_debug = args[:1] == ["--debug"]
    if args[is_debug:][:1] != ["bench"]:  # where it would slow llama.cpp's threads down
        # PyTorch's threads would spin while one of them waits for a core that others use: beside a
        # busy process, loading took ten times as long. Read when torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal cannot show is no error
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = _run(args[is_debug:])
            sys.stdout.flush()
        return status
    except SystemExit as stop:  # help was printed
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader has gone; so that the flush at exit does not complain either:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except Exception as error:
        if is_debug:
            raise
        return _report(error)


def _run(args: list[str]) -> int:
    verb, rest = (args[0], args[1:]) if args else ("", [])
    if verb in ("", "-h", "--help"):
        print(usage())
        return 0
    if verb == "--version":
        from twotower import __version__

        print(f"twotower {__version__}")
        return 0
    if verb not in VERBS:
        raise ValueError(f"{verb!r} is not a verb; use one of {', '.join(VERBS)}, or twotower -h")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    if verb == "lm-eval":  # its arguments are another program's
        from twotower.cli.lm_eval import run_arguments

        return run_arguments(rest)
    module = importlib.import_module(f"twotower.cli.{verb}")
    options_class: type = get_type_hints(module.run)["options"]
    help_text = None
    if verb == "train":
        rest, help_text = train_arguments(rest), _TRAIN_HELP
    try:
        status: int = module.run(parse(options_class, verb, rest, help_text))
    except ValueError as error:
        raise ValueError(name_flags(one_line(error), options_class, rest)) from error
    return status


def usage() -> str:
    """What `twotower -h` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {summary}" for verb, summary in VERBS.items()]
    return "\n".join(
        [
            "usage: twotower [-h] [--version] [--debug] VERB ...",
            "",
            "Two-tower block-diffusion language models: decode, inspect, train.",
            "",
            *lines,
            "",
            "twotower VERB -h shows a verb's options and their defaults.",
            "twotower --debug VERB ... shows the traceback of an error.",
        ]
    )


_TRAIN_HELP = """One training run. The same command again continues a run that was stopped.

twotower train RECIPE is short for --recipe RECIPE. --options FILE reads options from a TOML file, \
names as below; flags win."""


def train_arguments(args: list[str]) -> list[str]:
    """The flags of `train`: its positional recipe spelled out, a TOML file's options put first."""
    from twotower.cli.train import arguments_from_toml

    args = ["--recipe", *args] if args and not args[0].startswith("-") else list(args)
    for at, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name != "--options":
            continue
        if not equals and at + 1 == len(args):
            raise ValueError("--options needs a TOML file")
        file = value if equals else args[at + 1]
        return [*arguments_from_toml(Path(file)), *args[:at], *args[at + 2 - len(equals) :]]
    return args


def _report(error: Exception) -> int:
    """One line on stderr; the exit status says whose error it is."""
    match error:
        case ValueError() | ImportError():  # a missing optional library is for the user to install
            status, text = 2, one_line(error)
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            status, text = 2, f"{where}{error.strerror or one_line(error)}"
        case _:
            # torch comes too late to delay help
            from twotower.engine.faults import EngineDeadError, is_out_of_memory

            status, text = 1, one_line(error)
            if is_out_of_memory(error):
                status, text = 2, f"not enough memory; use smaller sizes or batches ({text})"
            elif not isinstance(error, EngineDeadError):
                kind = type(error).__name__
                text = f"{kind}: {text} (a defect of twotower? see twotower --debug VERB ...)"
    print(f"error: {text}", file=sys.stderr)
    return status


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {one_line(message)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
