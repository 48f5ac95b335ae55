"""What is lost when a replica is killed under load, or when a new version replaces the old one?

A local Ray cluster of two nodes, each a set of processes; replicas of the shipped model; clients
that send one request after another and try again, as the openai package does, when a connection
breaks or an answer says that it may be tried again (408, 429, 500 and above). A text must be the
same whichever replica wrote it. Counted: sent, answered, tried again, lost (answered by nobody
after all tries), different. The last line is one JSON object.

Limit: replicas share this machine, so the figures are about loss, not speed.
"""

import functools
import json
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from twotower.cli.machine import recorded
from twotower.cli.scripts import script_parser
from twotower.cli.serve import ServeArguments, build_app
from twotower.serve import replicas
from twotower.serve.access import Keys

PROMPTS = ("Q: What is 47 + 38?\nA:", "Q: What is 12 + 95?\nA:", "Q: What is 8 + 77?\nA:")
MAX_TRIES = 8


@dataclass
class Counts:
    """What clients have seen; `lock` guards all of it."""

    sent: int = 0
    answered: int = 0
    tried_again: int = 0
    lost: int = 0
    different: int = 0
    models: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **changes: int) -> None:
        with self.lock:
            for name, change in changes.items():
                setattr(self, name, getattr(self, name) + change)

    def record(self) -> dict[str, object]:
        with self.lock:
            own = ("sent", "answered", "tried_again", "lost", "different")
            return {name: getattr(self, name) for name in own} | {"models": dict(self.models)}


def ask(port: int, prompt: str) -> tuple[str, str]:
    """One request without another try: the model that answered, and its text."""
    body = json.dumps({"prompt": prompt, "max_tokens": 48, "seed": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    return answer["model"], answer["choices"][0]["text"]


def ask_until_answered(port: int, prompt: str, counts: Counts) -> tuple[str, str] | None:
    counts.add(sent=1)
    for attempt in range(MAX_TRIES):
        try:
            answer = ask(port, prompt)
        except urllib.error.HTTPError as error:
            if error.code not in (408, 429) and error.code < 500:
                raise
        except OSError:  # the connection broke
            pass
        else:
            counts.add(answered=1)
            return answer
        counts.add(tried_again=1)
        time.sleep(min(0.5 * 2**attempt, 8.0))
    counts.add(lost=1)
    return None


def client(port: int, expected: dict[str, str], counts: Counts, stop: threading.Event) -> None:
    number = 0
    while not stop.is_set():
        prompt = PROMPTS[number % len(PROMPTS)]
        number += 1
        if (answer := ask_until_answered(port, prompt, counts)) is not None:
            model, text = answer
            counts.add(different=int(text != expected[prompt]))
            with counts.lock:
                counts.models[model] = counts.models.get(model, 0) + 1


def kill_a_replica() -> None:
    """Kill one replica's process, as a crash would."""
    found = list_actors(filters=[("state", "=", "ALIVE")])
    names = [actor.name for actor in found if "#model#" in (actor.name or "")]
    ray.kill(ray.get_actor(names[0], namespace="serve"), no_restart=False)


def deploy(options: ServeArguments) -> None:
    replicas.deploy(functools.partial(build_app, options, Keys({})), options)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--port", type=int, default=8457, help="port of the server")
    parser.add_argument(
        "--clients", type=int, default=8, help="clients that send requests at the same time"
    )
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="seconds of load before and after each event"
    )
    given = parser.parse_args()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    options = ServeArguments(
        ray=True,
        min_replicas=2,
        max_replicas=2,
        replica_cpus=1.0,
        model_name="version-1",
        backend="eager",
    )
    deploy(options)
    expected = {prompt: ask(given.port, prompt)[1] for prompt in PROMPTS}
    counts, stop, records = Counts(), threading.Event(), {}
    threads = [
        threading.Thread(target=client, args=(given.port, expected, counts, stop))
        for _ in range(given.clients)
    ]
    for thread in threads:
        thread.start()
    time.sleep(given.seconds)
    records["before"] = counts.record()
    kill_a_replica()
    time.sleep(given.seconds)
    records["after a replica was killed"] = counts.record()
    deploy(ServeArguments(**{**vars(options), "model_name": "version-2"}))
    time.sleep(given.seconds)
    stop.set()
    for thread in threads:
        thread.join()
    records["after version-2 replaced version-1"] = counts.record()
    for name, record in records.items():
        print(name, record)
    print(
        json.dumps(
            {
                "recorded": recorded(),
                "clients": given.clients,
                "nodes": 2,
                "replicas": 2,
                "counts": records,
            }
        )
    )
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
