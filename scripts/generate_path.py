"""What must be read to follow one `twotower.generate` call? `generate_path.py [MODE] [native]`

Decodes a prompt with the shipped model and lists the files of the package whose functions ran:
all their lines, the lines of those functions, and the lines that were executed.
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType

import twotower
from twotower import checkpoint, engine, tokenizer  # noqa: F401  # imports are not the path
from twotower.checkpoint import load_checkpoint

ROOT = Path(twotower.__file__).parent


def main(mode: str = "diffusion", backend: str = "eager") -> None:
    """Print a line per file and their sum."""
    model = load_checkpoint(str(ROOT / "assets"))
    if backend == "native":
        model = twotower.accelerate(model, "native")
    words = twotower.load_tokenizer(str(ROOT / "assets"))
    options = twotower.GenerateOptions(mode=mode, max_new_tokens=24)  # type: ignore[arg-type]
    executed: dict[Path, set[int]] = defaultdict(set)

    def trace(frame: FrameType, event: str, argument: object) -> object:
        file = Path(frame.f_code.co_filename)
        if not file.is_relative_to(ROOT):
            return None
        executed[file].add(frame.f_lineno)
        return trace

    generate = twotower.generate  # imported before
    sys.settrace(trace)
    generate(model, ["Q: What is 25 + 99?\nA:"], options, words)
    sys.settrace(None)
    rows = [
        (len(file.read_text().splitlines()), lines_of_functions(file, lines), len(lines), file)
        for file, lines in sorted(executed.items())
    ]
    for *counts, file in rows:
        print("{:6d} {:6d} {:6d}".format(*counts), file.relative_to(ROOT))
    sums = [sum(row[at] for row in rows) for at in range(3)]
    print("{:6d} {:6d} {:6d}".format(*sums), f"lines in {len(rows)} files, of functions, executed")


def lines_of_functions(file: Path, executed: set[int]) -> int:
    """The lines of the functions of a file in which a line was executed."""
    functions = [
        set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    return len(set().union(*(own for own in functions if executed & own)))


if __name__ == "__main__":
    main(*sys.argv[1:])
