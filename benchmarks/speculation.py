"""How many tokens does a draft yield, and what does it save: by category and by draft passes?

Lossless by construction: the last column counts texts equal to AR's. Physical limit: a cycle is one
denoiser pass and one verification, so `block_size` tokens for two passes at best. Settings take
turns on every prompt; the last line is one JSON object.
"""

import json

import torch

import twotower
from twotower.checkpoint import load_checkpoint
from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser
from twotower.engine import GenerateOptions
from twotower.lab.corpus import CATEGORIES
from twotower.lab.evaluate.results import summarise
from twotower.lab.evaluate.run import Subject, Trace, draw_groups, evaluate, warm_up
from twotower.lab.evaluate.sandbox import find_sandbox
from twotower.lab.evaluate.suite import make_judge


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--model", default=twotower.__path__[0] + "/assets", help="checkpoint folder"
    )
    parser.add_argument(
        "--passes",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        help="denoiser passes per draft, one setting each",
    )
    parser.add_argument("--items", type=int, default=20, help="prompts of each category")
    parser.add_argument("--seed", type=int, default=1, help="seed of the prompts")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a forward pass")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    options = {"ar": GenerateOptions(mode="ar", temperature=args.temperature)} | {
        f"{n} draft passes": GenerateOptions(
            mode="speculative", draft_passes=n, temperature=args.temperature
        )
        for n in args.passes
    }
    subject = Subject(
        model=load_checkpoint(args.model),
        tokenizer=twotower.load_tokenizer(args.model),
        options=options,
    )
    judge = make_judge(find_sandbox())
    groups = draw_groups(CATEGORIES, args.items, args.seed, batch_size=1)
    warm_up(subject, groups[0][0])
    items = list(evaluate(subject, groups, {name: Trace() for name in options}, judge))
    record = summarise(items, list(options), args.seed)
    print(f"{'':14s}{'setting':16s}{'tokens/cycle':>14s}{'NFE':>7s}{'x ar':>7s}{'same':>9s}")
    for category, modes in {**record["categories"], "all": record["modes"]}.items():
        for name, row in modes.items():
            print(
                f"{category:14s}{name:16s}{row['tokens_per_forward']:14.2f}{row['nfe']:7d}"
                f"{row['speed_ratio']:7.2f}{row['same_as_ar']:5d}/{row['n']}"
            )
    print(
        json.dumps(
            {**record, "options": vars(args), "torch": torch.__version__, "recorded": recorded()}
        )
    )


if __name__ == "__main__":
    main()
