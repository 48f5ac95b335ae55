"""What does a grammar cost, and does it cost draft tokens?

Masks: time to follow a token and get the next mask from the row's own process, by vocabulary and
grammar; other rows wait for it where it was not asked for in time. Limit: a pass of the model,
which it should be far below. Acceptance: tokens per context
pass in mode="speculative" on tool calls, with the grammar and without. The last line is JSON.
"""

import json
import platform
import random
import statistics
import sys
import sysconfig
import time
from importlib.metadata import version
from pathlib import Path

import twotower
from twotower import GenerateOptions, generate, load_tokenizer
from twotower.checkpoint import load_checkpoint
from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser
from twotower.engine.grammar import Grammar, json_schema, regex
from twotower.engine.grammar_state import TokenRules, begin
from twotower.lab.corpus import tools
from twotower.serve.tool_calls import HERMES, tool_call
from twotower.tokenizer import Tokenizer, train_tokenizer

ASSETS = Path(twotower.__file__).parent / "assets"
LARGE = 32_768
NUM_PROMPTS = 24
RECORD = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "year": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "kind": {"enum": ["book", "film", "song"]},
    },
    "required": ["title", "year", "tags", "kind"],
    "additionalProperties": False,
}
SHORT_RECORD = RECORD | {
    "properties": {
        "title": {"type": "string", "maxLength": 24},
        "year": {"type": "integer", "minimum": 1800, "maximum": 2030},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "good"]}, "maxItems": 2},
        "kind": {"enum": ["book", "film", "song"]},
    }
}
RECORD_TEXT = json.dumps(
    {"title": "The old man and the sea", "year": 1952, "tags": ["sea", "novel"], "kind": "book"}
)


def tools_of(names: list[str]) -> list[dict[str, object]]:
    by_name = {tool.name: tool for tool in tools.TOOLS}
    return [
        {"type": "function", "function": {"name": n, "parameters": tools.schema_of(by_name[n])}}
        for n in names
    ]


def cases() -> dict[str, tuple[Grammar, str]]:
    """A grammar and a text of it, by name."""
    all_tools = tools_of([tool.name for tool in tools.TOOLS])
    call = '{"name": "translate", "arguments": {"text": "my red house", "language": "Dutch"}}'
    required, optional = tool_call(all_tools, "required"), tool_call(all_tools, "auto", HERMES)
    return {
        "schema": (json_schema(RECORD), RECORD_TEXT),
        "any JSON": (json_schema(True), RECORD_TEXT),
        f"{len(all_tools)} tools, required": (required, call),
        f"{len(all_tools)} tools, auto": (optional, f"I ask.<tool_call>\n{call}\n</tool_call>"),
        "regex": (regex(r"[A-Z][a-z]+( [a-z]+){0,20}\."), "Boats went out to the sea again."),
    }


def micro(start: float) -> float:
    return (time.perf_counter() - start) * 1e6


def mask_costs(tokenizer: Tokenizer) -> dict[str, dict[str, float]]:
    """Microseconds: building, and per token."""
    rules = TokenRules(eos=(2,), mask_token_id=3, vocab_size=tokenizer.vocab_size)
    begin(regex("a"), tokenizer, rules)  # the vocabulary is read once
    found = {}
    for name, (grammar, text) in cases().items():
        start = time.perf_counter()
        begin(grammar, tokenizer, rules)
        compiled, times = micro(start), []
        for _ in range(20):
            state, tokens = begin(grammar, tokenizer, rules), tokenizer.encode(text)
            for place in range(len(tokens) + 1):
                start = time.perf_counter()
                state.follow(tokens[:place])
                state.mask()
                times.append(micro(start))
        times.sort()
        found[name] = {
            "compile_us": round(compiled),
            "median_us": round(statistics.median(times)),
            "p99_us": round(times[len(times) * 99 // 100]),
            "max_us": round(times[-1]),
        }
    return found


def large_tokenizer() -> Tokenizer:
    """Learnt from the sources of Python's own library, to have one of a usual size."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/*.py"))[:400]
    return train_tokenizer((file.read_text("utf-8", "ignore") for file in files), LARGE)


def acceptance() -> dict[str, dict[str, float]]:
    """Tokens per context pass: tool calls free and under their grammar, and a grammar that the
    model has never seen.
    """
    model, tokenizer = load_checkpoint(ASSETS), load_tokenizer(ASSETS)
    rng = random.Random(7)
    drafts = [tools.draw(rng) for _ in range(NUM_PROMPTS)]
    shown = [[line.split("(")[0] for line in d.prompt.split("\n")[1:-2]] for d in drafts]
    grammars: dict[str, list[Grammar | None]] = {
        "free": [None] * NUM_PROMPTS,
        "calls": [tool_call(tools_of(names), "required") for names in shown],
        "foreign": [json_schema(SHORT_RECORD)] * NUM_PROMPTS,
    }
    found = {}
    for name, own in grammars.items():
        rows = {
            mode: generate(
                model,
                [draft.prompt for draft in drafts],
                [GenerateOptions(mode=mode, max_new_tokens=96, grammar=one) for one in own],
                tokenizer,
            )
            for mode in ("ar", "speculative")
        }
        assert [r.tokens for r in rows["ar"]] == [r.tokens for r in rows["speculative"]]
        tokens, passes, nfe = (
            sum(count)
            for count in zip(
                *((len(r.tokens), r.context_forwards, r.nfe) for r in rows["speculative"]),
                strict=True,
            )
        )
        found[name] = {
            "tokens": tokens,
            "context_forwards": passes,
            "nfe": nfe,
            "tokens_per_context_forward": round(tokens / passes, 2),
        }
    return found


def main() -> int:
    script_parser(__doc__).parse_args()  # -h
    shipped, large = load_tokenizer(ASSETS), large_tokenizer()
    result = {f"masks, {one.vocab_size} tokens": mask_costs(one) for one in (shipped, large)} | {
        "speculative": acceptance()
    }
    versions = {name: version(name) for name in ("torch", "llguidance", "tokenizers")}
    about = {"python": platform.python_version(), **versions}
    print(json.dumps({"recorded": recorded(), "about": about, **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
