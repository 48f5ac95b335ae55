"""Options of replicas, and what a replica tells Ray of itself. The cluster: benchmarks."""

import pickle
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from twotower.cli.serve import ServeArguments, build_app
from twotower.serve.access import Keys
from twotower.serve.replicas import Replica, ReplicaOptions


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"ray": True, "min_replicas": 0}, "min_replicas=0"),
        ({"ray": True, "min_replicas": 3, "max_replicas": 2}, "max_replicas=2"),
        ({"ray": True, "replica_cpus": -1.0}, "replica_cpus=-1.0"),
        ({"ray": True, "replica_gpus": float("inf")}, "replica_gpus=inf"),
        ({"max_replicas": 2}, "max_replicas: no effect without --ray; add it"),
        ({"min_replicas": 2}, "min_replicas: no effect without --ray; add it"),
        ({"ray_address": "auto"}, "ray_address: no effect without --ray; add it"),
    ],
)
def test_bad_options_are_named(given: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ReplicaOptions(**given)  # type: ignore[arg-type]


def test_a_replica_has_both_towers() -> None:
    with pytest.raises(ValueError, match="denoiser_device=peer: a replica is one process"):
        ServeArguments(ray=True, denoiser_device="peer")


@pytest.mark.parametrize("given", [{"quantization": "int8"}, {"expert_storage": "mmap"}])
def test_a_server_passes_on_what_weights_to_run(given: dict[str, str]) -> None:
    """Silent failure: an option of the command that never reaches the model. Both are refused for
    this model and backend, which shows that they arrived."""
    options = ServeArguments(backend="eager", **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=next(iter(given))):
        build_app(options, Keys({}))


def test_a_replica_is_built_from_what_was_sent_and_tells_when_it_does_not_decode() -> None:
    """Guards the way to another machine (all that is sent can be pickled), and a replica whose
    worker is not running and which Ray would otherwise keep sending requests."""
    options = ServeArguments(backend="eager", chat_template=None, filter=("bad",))
    build = pickle.loads(pickle.dumps(partial(build_app, options, Keys({"team": "secret-key"}))))
    replica = Replica(build)
    app = replica.__serve_build_asgi_app__()
    with pytest.raises(RuntimeError, match="restarting"):
        replica.check_health()
    app.state.service.worker.start()
    replica.check_health()
    app.state.service.worker.stop(0.0)


def test_missing_ray_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from twotower.serve import replicas

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[ray\]'"):
        replicas.run(lambda: pytest.fail(str(Path())), ServeArguments())
