"""`twotower lm-eval`: lm-eval's own command line, with our models and tasks known to it."""

from collections.abc import Sequence
from pathlib import Path

from twotower.cli.measuring import say_protection
from twotower.cli.progress import load_with_bar
from twotower.lab.evaluate.lm_harness import (
    Decoder,
    HarnessOptions,
    register,
    run_harness,
    write_tasks,
)
from twotower.lab.evaluate.sandbox import find_sandbox
from twotower.loading import Placement

USAGE = """usage: twotower lm-eval --write-tasks FOLDER [--items N] [--seed N]
       twotower lm-eval LM_EVAL_ARGUMENTS ...

The first form writes the suite as lm-eval tasks. The second is lm-eval itself, which then knows
--model twotower (--model_args pretrained=PATH,mode=diffusion,batch_size=8; the shipped model
without pretrained) and, with --include_path FOLDER, the group twotower_mini.
twotower lm-eval run --help shows lm-eval's own options."""


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


def load_decoder(options: HarnessOptions) -> Decoder:
    """Load what `pretrained` names; ValueError (one line) if it cannot be."""
    # HarnessOptions has checked mode and dtype.
    placement = Placement(
        model=options.pretrained,
        dtype=options.dtype,  # type: ignore[arg-type]
        device=options.device,
        denoiser_device=options.denoiser_device,
    )
    loaded = load_with_bar(placement, options.mode)
    return Decoder(model=loaded.model, tokenizer=loaded.need_tokenizer(), options=options)
