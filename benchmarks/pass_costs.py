"""What does a pass over several tokens of several rows cost in AR steps of those rows?

Drafts are as long as that table says (`Backend.pass_costs`, `engine/drafts.py`): measured stands
beside reckoned. Physical limit: a pass streams the tower's weights once, however many tokens it
reads, until its arithmetic takes longer than that. Medians of interleaved repeats. The last line is
one JSON object.

    python benchmarks/pass_costs.py --model smollm2.gguf --quantization int8 --threads 2
    python benchmarks/pass_costs.py --model experts --quantization int8
"""

import json
import statistics
import time

import torch

import twotower
from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser
from twotower.engine.drafts import BatchCosts
from twotower.engine.logits import best_tokens
from twotower.families import config_from_dict
from twotower.families.nemotron_h import NANO_30B
from twotower.model.initialise import randomise

LENGTHS = (1, 2, 4, 6, 8, 12, 16, 32, 64)


def median_ms(model: twotower.TwoTower, num_rows: int, past: int, repeats: int) -> dict[int, float]:
    """Milliseconds of a verification by its tokens, head and choice included."""
    # Rows of one text would choose the same experts.
    ids = torch.arange(5, 5 + num_rows * past).remainder(model.config.vocab_size - 10)
    ids = ids.view(num_rows, past)
    cache = model.prefill(ids)
    times: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for _ in range(repeats):
        for length, own in times.items():
            tokens, counts = ids[:, :length].contiguous(), torch.full((num_rows,), length)
            began = time.perf_counter()
            output = model.verify(cache, tokens, counts, is_draft=length > 1)
            best_tokens(model, output.hidden, ())
            own.append((time.perf_counter() - began) * 1e3)
    return {length: statistics.median(own[1:]) for length, own in times.items()}


def random_experts() -> twotower.TwoTower:
    """A backbone with the pattern and proportions of Nemotron-3-Nano, at 64 experts a layer."""
    sizes = {
        "hybrid_override_pattern": "MEM*EMEMEM*EMEMEM*EMEME", "hidden_size": 1024,
        "vocab_size": 49152, "num_attention_heads": 16, "mamba_num_heads": 32,
        "n_routed_experts": 64, "moe_intermediate_size": 704,
        "moe_shared_expert_intermediate_size": 1408,
    }  # fmt: skip
    config = config_from_dict({**NANO_30B, **sizes, "intermediate_size": 1408})
    model = twotower.TwoTower(config, towers="context")
    randomise(model, seed=0)
    return model.requires_grad_(False).eval()


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--model",
        help="checkpoint folder, GGUF file or hub id; experts: random weights, 1.2 billion, in the "
        "shape of Nemotron-3-Nano; without it the shipped model",
    )
    parser.add_argument("--quantization", default="none", help="of the weights: none, int8 or int4")
    parser.add_argument(
        "--backend", default="native", help="what runs forward passes: native, eager or graphs"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a forward pass")
    parser.add_argument(
        "--rows", default="1,4,16", help="numbers of rows in a pass, separated by commas"
    )
    parser.add_argument("--past", type=int, default=200, help="tokens that the cache holds")
    parser.add_argument("--repeats", type=int, default=9, help="timed passes of each kind")
    given = parser.parse_args()
    how = {"backend": given.backend, "quantization": given.quantization}
    torch.set_num_threads(given.threads)
    model = (
        twotower.accelerate(random_experts(), **how)
        if given.model == "experts"
        else twotower.load_model(given.model, threads=given.threads, **how)
    )
    result: dict[str, dict[str, object]] = {}
    for rows in map(int, given.rows.split(",")):
        times = median_ms(model, rows, given.past, given.repeats)
        measured = {n: round(ms / times[1], 2) for n, ms in times.items()}
        passes = BatchCosts(model.pass_costs._replace(step_s=None))  # with nothing around
        step = passes.of_pass([1] * rows)
        reckoned = {n: round(passes.of_pass([n] * rows) / step, 2) for n in times}
        result[str(rows)] = {"ar_ms": round(times[1], 2), "cost": measured, "reckoned": reckoned}
        print(
            f"{rows:3} rows, AR step {times[1]:.2f} ms: {measured}; reckoned {reckoned}", flush=True
        )
    print(json.dumps({"recorded": recorded(), **vars(given), "rows_measured": result}))


if __name__ == "__main__":
    main()
