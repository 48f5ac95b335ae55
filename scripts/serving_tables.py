"""Tables of figures.md on servers and hosts."""

from figure_tables import Record, markdown, number


def serve_load(record: Record) -> str:
    """What happened to every request, and how long answers took."""
    runs = record["results"]
    labels = {
        "told": "ended with an error (decoding thread killed)",
        "refused": "refused (429, 503)",
        "left": "left by the client",
    }
    rows: list[list[str]] = [
        [labels.get(name, name), *(f"{run[name]:,}" for run in runs)]
        for name in ("sent", "answered", "told", "refused", "left", "lost")
    ]
    malformed = (sum(run["malformed"].values()) for run in runs)
    rows.append(["malformed, all answered 400", *(f"{count:,}" for count in malformed)])
    rows.append(["tokens/s", *(f"{run['tokens_per_s']:,.0f}" for run in runs)])
    for name, label, scale in (
        ("time_to_first_block_s", "time to first block, p50, p95, ms", 1000),
        ("time_per_token_s", "time per token, p50, p95, ms", 1000),
        ("whole_answer_s", "whole answer, p50, p95, s", 1),
    ):
        ends = ([run[name][p] * scale for p in ("p50", "p95")] for run in runs)
        rows.append([label, *(f"{low:.3g}, {high:.3g}" for low, high in ends)])
    memory = ([run["memory_mb"][name] for name in ("before", "after")] for run in runs)
    rows.append(["resident memory, before, after, MB", *(f"{a:,.0f}, {b:,.0f}" for a, b in memory)])
    return markdown(["", *(run["mode"] for run in runs)], rows)


def serve_throughput(record: Record) -> str:
    """Tokens a second by threads, clients and server, and over llama.cpp's."""
    servers = {"llama.cpp": "llama.cpp", "ar": "twotower, ar", "speculative": "twotower, default"}
    rows = [
        [
            *(run["threads"], run["clients"], label, f"{run[name]['tokens_per_s']:,.0f}"),
            number(run[name]["tokens_per_s"] / run["llama.cpp"]["tokens_per_s"]),
            *(number(run[name][key]) for key in ("first_ms", "token_ms")),
        ]
        for run in record["results"]
        for name, label in servers.items()
    ]
    head = ["threads", "clients", "server", "tokens/s", "x llama.cpp", "first token, ms"]
    return markdown([*head, "ms a token, each client"], rows)


def ray_replicas(record: Record) -> str:
    """Requests while replicas die and are replaced."""
    names = ("sent", "answered", "tried_again", "lost", "different")
    rows = [[when, *(f"{found[n]:,}" for n in names)] for when, found in record["counts"].items()]
    return markdown(["so far", "sent", "answered", "tried again", "lost", "other texts"], rows)


def two_hosts(record: Record) -> str:
    """Texts, bytes and waiting by the delay of the connection."""
    rows = [
        [
            f"{one['delay_ms']} ms",
            one["equal_texts"],
            f"{one['bytes_sent_per_block']:,.0f}",
            f"{one['bytes_received_per_block']:,.0f}",
            f"{one['ms_per_block']:.0f} ms",
        ]
        for one in record["results"]
    ]
    head = ["delay each way", "texts equal to one process's", "bytes to the denoiser, per block"]
    return markdown([*head, "bytes back", "wait per block"], rows)
