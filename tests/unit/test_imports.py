"""The import directions of docs/architecture.md and the fences around third-party libraries.

Read from the syntax tree, so imports inside functions and under TYPE_CHECKING count as well.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "twotower"

# What every package may import.
COMMON = {"config", "specs", "arguments", "paths", "documented", "file_lock", "masks"}
ALLOWED: dict[str, set[str]] = {
    "specs": {"arguments"},
    "config": {"specs", "arguments"},
    "arguments": set(),
    "paths": {"arguments"},
    "documented": {"arguments"},
    "masks": set(),
    "file_lock": set(),
    "diffusion": COMMON,
    "memory": set(),
    "cores": set(),
    "tokenizer": COMMON,
    "kernels": COMMON,
    "layers": COMMON | {"kernels"},
    "model": COMMON | {"layers", "kernels"},
    "native": COMMON | {"model", "layers", "kernels"},
    "graphs": COMMON | {"model", "layers", "kernels", "diffusion"},
    "backends": COMMON | {"model", "native", "graphs"},
    "families": COMMON | {"layers"},
    "checkpoint": COMMON | {"families", "model", "kernels", "tokenizer", "memory"},
    "engine": COMMON | {"model", "diffusion", "tokenizer", "memory"},
    "train": COMMON
    | {"families", "layers", "model", "backends", "diffusion", "checkpoint", "tokenizer"},
    "adapt": COMMON | {"layers", "model", "engine", "checkpoint", "train"},
    "serve": COMMON | {"engine", "tokenizer"},
    "hosts": COMMON | {"engine", "model", "diffusion", "layers"},
    "loading": COMMON
    | {"families", "model", "backends", "checkpoint", "tokenizer", "hosts"}
    | {"cores"},
    # The laboratory measures the library: it may use all of it, and nothing of the library uses it.
    "lab": set(),
    "lab.corpus": COMMON,
    "lab.report": set(),
    "lab.evaluate": COMMON
    | {"engine", "model", "diffusion", "tokenizer", "lab.corpus", "lab.report"},
    "lab.plan": COMMON | {"families", "model", "checkpoint", "lab.report"},
    "lab.bench": COMMON
    | {"families", "engine", "model", "backends", "native", "kernels", "diffusion", "checkpoint"}
    | {"loading", "memory", "tokenizer", "lab.evaluate", "lab.corpus", "lab.plan", "lab.report"},
}
TOP = {"__init__", "__main__", "cli"}  # these import all; nothing imports them

# Third-party library -> the only modules (path prefixes) that may import it.
FENCES: dict[str, tuple[str, ...]] = {
    "safetensors": ("checkpoint", "train.state", "adapt"),
    "huggingface_hub": ("checkpoint",),
    "tokenizers": ("tokenizer",),
    "tyro": ("cli",),
    "rich": ("cli",),
    "num2words": ("lab.corpus",),
    "babel": ("lab.corpus",),
    "tensorboard": ("train",),
    "pyarrow": ("train.readers",),
    "jsonschema": ("lab.evaluate",),
    "lm_eval": ("lab.evaluate.lm_harness",),
    "tqdm": ("lab.evaluate.lm_harness",),  # lm-eval needs it
    "matplotlib": ("lab",),
    "gguf": ("checkpoint", "families", "lab.bench.baselines"),
    "torchao": ("checkpoint.quantize",),
    "xllamacpp": ("lab.bench.baselines",),
    "transformers": ("lab.bench.baselines",),
    # Of the extra serve: loaded by the verb alone, which names what is missing.
    "fastapi": ("serve",),
    "starlette": ("serve",),
    "pydantic": ("serve",),
    "pydantic_core": ("serve",),
    "anyio": ("serve",),
    "uvicorn": ("serve",),
    "h11": ("serve.server",),
    "sse_starlette": ("serve",),
    "prometheus_client": ("serve",),
    "jinja2": ("serve",),
    "ray": ("serve.replicas",),
    "llguidance": ("engine.grammar_child",),
    # Of a module that is itself imported inside a function.
    "triton": ("kernels.fused", "kernels.fused_products"),
    "mamba_ssm": ("kernels",),
    "causal_conv1d": ("kernels",),
    "flash_attn": ("kernels",),
}
OPTIONAL = {
    "num2words",
    "babel",
    "tensorboard",
    "pyarrow",
    "jsonschema",
    "lm_eval",
    "tqdm",
    "llguidance",
    "matplotlib",
    "ray",
    "gguf",
    "torchao",
    "xllamacpp",
    "transformers",
    "mamba_ssm",
    "causal_conv1d",
    "flash_attn",
}
UNFENCED = {"torch", "numpy"}


class Import(NamedTuple):
    line: int
    name: str  # absolute dotted name, "twotower.model.state"
    is_deferred: bool  # inside a function or under TYPE_CHECKING: not run on import


def absolute(node: ast.ImportFrom, module: str) -> str:
    """The dotted name that a from-import starts at; `module` is "engine.options" or "__init__"."""
    if node.level == 0:
        return node.module or ""
    parts = ["twotower", *module.split(".")][: -node.level]
    return ".".join([*parts, *(node.module or "").split(".")]).rstrip(".")


def names_of(node: ast.AST, module: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = absolute(node, module)
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = ast.unparse(node.func).split(".")[-1]
        if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


def imports(node: ast.AST, module: str, deferred: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for name in names_of(child, module):
            yield Import(getattr(child, "lineno", 0), name, deferred)
        defers = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        )
        yield from imports(child, module, deferred or defers)


def unit_of(module: str) -> str:
    """The row of the table that a dotted path under twotower belongs to."""
    first, *rest = module.split(".")
    known = set(ALLOWED) | TOP
    inner = ".".join([first, *rest[:1]])
    return inner if inner in known else first if first in known else ""


def our_fault(unit: str, name: str) -> str | None:
    target = unit_of(name.partition(".")[2]) or "__init__"
    if unit in TOP or target == unit or target in ALLOWED[unit]:
        return None
    return f"{unit} may not import {target}"


def foreign_fault(module: str, found: Import) -> str | None:
    library = found.name.split(".")[0]
    if found.name.startswith("torch.utils.tensorboard"):
        library = "tensorboard"  # torch only wraps it
    if library in sys.stdlib_module_names:
        return None
    if library in UNFENCED:
        is_tensor_in_serve = library == "torch" and module.split(".")[0] == "serve"
        return "serve sees records, never a tensor" if is_tensor_in_serve else None
    if library not in FENCES:
        return f"{library} is not a dependency of twotower; declare it here and in pyproject.toml"
    if not any(f"{module}.".startswith(f"{place}.") for place in FENCES[library]):
        return f"{library} only in {', '.join(FENCES[library])}"
    if library in OPTIONAL and not found.is_deferred:
        return f"{library} is optional: import it inside the function that needs it"
    return None


def faults(source: str, module: str) -> list[str]:
    """Every forbidden import of one module, `module` being its dotted path under twotower."""
    unit = unit_of(module)
    if not unit:
        return [
            f"{module} has no place in the import table; add it here and in docs/architecture.md"
        ]
    found = []
    for item in imports(ast.parse(source), module):
        ours = item.name.split(".")[0] == "twotower"
        fault = our_fault(unit, item.name) if ours else foreign_fault(module, item)
        if fault:
            found.append(f"line {item.line}: {fault}")
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def test_source_follows_import_directions() -> None:
    """Guards against a layer that quietly reaches up or sideways and cannot be used alone again."""
    paths = sorted(PACKAGE.rglob("*.py"))
    assert paths, f"no source files under {PACKAGE}"
    found = [
        f"{path}: {fault}"
        for path in paths
        for fault in faults(path.read_text(encoding="utf-8"), module_of(path))
    ]
    assert not found, "\n".join(found)


BAD = [
    ("layers.attention", "from twotower.model.state import KV"),
    ("layers.attention", "from ..model import state"),
    ("layers.attention", "def f():\n    from .. import engine"),
    ("layers.__init__", "from ..engine import options"),
    ("diffusion.commit", "import twotower.model"),
    (
        "diffusion.commit",
        "def f():\n    import importlib\n    importlib.import_module('twotower.cli')",
    ),
    ("engine.block_loop", "from twotower import load_checkpoint"),
    ("engine.block_loop", "from twotower.checkpoint.load import load_checkpoint"),
    ("serve.app", "import twotower.model"),
    ("serve.app", "import torch"),
    ("config", "from .masks import causal"),
    ("engine.options", "from twotower.lab.evaluate import results"),
    ("engine.options", "def f():\n    from twotower import lab"),
    ("train.sources", "def f():\n    from twotower.lab.corpus import documents"),
    ("lab.corpus.numbers", "from twotower.lab.evaluate import results"),
    ("model.layer", "from safetensors.torch import load_file"),
    ("engine.options", "import tyro"),
    ("train.loop", "from rich.progress import Progress"),
    ("train.loop", "from torch.utils.tensorboard import SummaryWriter"),
    ("lab.corpus.numbers", "from num2words import num2words"),
    ("lab.corpus.numbers", "def f():\n    import pandas"),
    ("lab.bench.runners", "def f():\n    import xllamacpp"),
    ("model.two_tower", "def f():\n    from twotower.native import backend"),
    ("engine.scheduler", "from twotower.backends import accelerate"),
    ("checkpoint.gguf", "from gguf import GGUFWriter"),
    ("utils.things", "import math"),
]
GOOD = [
    ("engine.block_loop", "from ..model.two_tower import TwoTower\nfrom . import options"),
    (
        "engine.block_loop",
        "import math\nimport torch.nn.functional as F\nfrom twotower import masks",
    ),
    ("cli.train", "from rich.progress import Progress"),
    ("train.log", "def f():\n    from torch.utils.tensorboard import SummaryWriter"),
    ("lab.corpus.numbers", "def f():\n    from num2words import num2words"),
    ("lab.corpus.numbers", "if TYPE_CHECKING:\n    from babel import Locale"),
    ("tokenizer", "from tokenizers import Tokenizer"),
    ("lab.bench.baselines", "def f():\n    from transformers import AutoModelForCausalLM"),
    ("__init__", "from .engine import generate\nfrom .checkpoint.load import load_checkpoint"),
    ("cli.demo", "import twotower\nfrom twotower.train.loop import train"),
]


@pytest.mark.parametrize(("module", "source"), BAD)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    """Guards the checker itself: a rule that cannot fail protects nothing."""
    assert len(faults(source, module)) == 1


@pytest.mark.parametrize(("module", "source"), GOOD)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert faults(source, module) == []
