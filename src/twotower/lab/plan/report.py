"""A plan for readers: sentences and tables."""

from collections.abc import Mapping

from twotower.lab.report import Record, Table

_GIB, _MIB = 2**30, 2**20
MODE_COLUMNS = (
    "where",
    "tokens/s",
    "decoding",
    "a row",
    "first tokens, ms",
    "overlapped",
    "$ a million",
)
PASS_COLUMNS = ("ms", "overhead", "bandwidth", "arithmetic", "host link", "experts", "ruled by")


def tables(record: Record) -> list[Table]:
    """The modes, and the passes where there are any."""
    modes = [[mode, *mode_row(found)] for mode, found in record["modes"].items()]
    found = [Table("modes", ("mode", *MODE_COLUMNS), modes)]
    if record["passes"]:
        passes = [[call, *pass_row(row)] for call, row in record["passes"].items()]
        found.append(Table("passes, ms", ("pass", *PASS_COLUMNS), passes))
    return found


def headline(record: Record) -> list[str]:
    """A sentence per finding: memory, each mode, the break-even, which is faster at which batch."""
    lines = memory_lines(record)
    lines += [_mode_sentence(mode, found) for mode, found in record["modes"].items()]
    if record["break_even"] is not None:
        lines.append(_even_sentence(record))
    whole, each = record["spans"]["all"], record["spans"]["per_device"]
    if whole:
        lines.append(f"Faster, by batch size (1, 2, 4, ...): {_spans(whole)}.")
    if each != whole:
        lines.append(f"Per device: {_spans(each)}.")
    return lines


def memory_lines(record: Record) -> list[str]:
    """What the towers and a row's cache take, and what a device offers."""
    memory = record["memory"]
    towers = ", ".join(f"{tower} {_bytes(n)}" for tower, n in memory["tower_bytes"].items())
    return [
        f"Weights: {towers}. A row's cache: {_bytes(memory['cache_bytes_per_row'])}. A device "
        f"offers {_bytes(memory['usable_bytes_per_device'])}, there "
        f"{'is' if record['devices'] == 1 else 'are'} {record['devices']}."
    ]


def _bytes(count: float) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / _MIB:.1f} MiB"


def _mode_sentence(mode: str, found: Record) -> str:
    if not found["fits"]:
        return f"{mode} does not fit: {found['missing']}."
    if "missing" in found:
        return f"{mode} fits ({found['device_map']['name']}); {found['missing']}."
    cost = found["dollars_per_million_tokens"]
    price = "" if cost is None else f", {cost:.2f} dollars a million"
    return (
        f"{mode}: {found['tokens_per_s']:.1f} tokens/s{price}, on {found['device_map']['name']}"
        f"{_overlap(found)}."
    )


def _overlap(found: Record) -> str:
    """What two groups of rows that overlap give against one in sequence, where there may be two."""
    if found["decode_ms_overlapped"] is None:
        return ""
    gain = found["decode_ms_in_sequence"] / found["decode_ms_overlapped"]
    used = "used" if found["overlapped"] else "not used"
    return f"; two groups of rows overlapped decode at {gain:.2f} times one group's speed: {used}"


def _even_sentence(record: Record) -> str:
    even = record["break_even"]
    return (
        f"A denoiser pass takes {even['denoise_per_ar_step']:.2f} AR steps. "
        f"Diffusion {_reaches(even['tokens_per_nfe'], 'tokens per denoiser pass (tokens/NFE)')}; "
        f"speculation {_reaches(even['tokens_per_cycle'], 'tokens a cycle')}."
    )


def _reaches(needed: Mapping[str, float | None], unit: str) -> str:
    """From which value of its one quantity on a mode reaches each multiple of AR's speed."""
    if needed["1"] is None:  # and then no multiple of it
        return "never reaches AR's speed"
    said = []
    for target, value in needed.items():
        what = "AR's speed" if target == "1" else f"{target} times it"
        said.append(f"{what} never" if value is None else f"{what} from {value:.2f} {unit} on")
    return "reaches " + ", ".join(said)


def _spans(spans: list[Record]) -> str:
    """'ar 1 to 6, diffusion 7 to 61, ar from 62 on'."""
    *inner, last = spans
    shown = [f"{span['winner']} {span['first']} to {span['last']}" for span in inner]
    return ", ".join([*shown, f"{last['winner']} from {last['first']} on"])


def mode_row(found: Record) -> list[str]:
    """The cells of MODE_COLUMNS."""
    where = found["device_map"]["name"] if found["fits"] else "does not fit"
    if "missing" in found:
        return [where, *["-"] * (len(MODE_COLUMNS) - 1)]
    decode, cost = found["decode_tokens_per_s"], found["dollars_per_million_tokens"]
    return [
        where,
        f"{found['tokens_per_s']:.1f}",
        "-" if decode is None else f"{decode:.1f}",
        f"{found['tokens_per_s_of_a_row']:.1f}",
        f"{found['first_tokens_ms']:.0f}",
        "yes" if found["overlapped"] else "no",
        "-" if cost is None else f"{cost:.2f}",
    ]


def pass_row(found: Record) -> list[str]:
    """The cells of PASS_COLUMNS."""
    names = ("ms", "overhead_ms", "stream_ms", "compute_ms", "host_ms")
    return [
        *[f"{found[name]:.2f}" for name in names],
        f"{found['experts_per_layer']:.0f}",
        found["ruled_by"],
    ]
