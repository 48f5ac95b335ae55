"""The same app on many machines: a Ray Serve deployment of replicas, each with a model of its own.

A request needs nothing of an earlier one, so any replica may answer it. Keys, limits, caches of
prefixes and n-grams, and /metrics are each replica's own.
"""

import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from twotower.arguments import check_fields, number
from twotower.engine import EngineOptions
from twotower.serve.options import ServeOptions

if TYPE_CHECKING:
    from fastapi import FastAPI

_log = logging.getLogger("twotower.serve")
APP_NAME = "twotower"


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """Replicas of the server on a Ray cluster."""

    ray: bool = False
    """Serve with replicas on a Ray cluster instead of in this process."""
    ray_address: str | None = None
    """Cluster to join, such as auto. Default: start one on this machine. A second run on the same
    cluster replaces the replicas one by one."""
    min_replicas: int = 1
    """Minimum number of replicas."""
    max_replicas: int = 1
    """Maximum number of replicas; between the two, their number follows the load."""
    replica_cpus: float = 1.0
    """CPU cores that each replica reserves."""
    replica_gpus: float = 0.0
    """GPUs that each replica reserves."""

    def __post_init__(self) -> None:
        if not self.ray:
            for field in fields(ReplicaOptions):
                if getattr(self, field.name) != field.default:
                    raise ValueError(f"{field.name}: no effect without --ray; add it")
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(
                f"min_replicas={self.min_replicas} max_replicas={self.max_replicas}: must be at "
                "least 1, and the second no less than the first"
            )
        check_fields(self, dict.fromkeys(("replica_cpus", "replica_gpus"), number(0)))


class Replica:
    """One replica: builds the app where it runs, and tells Ray whether it still decodes."""

    def __init__(self, build: Callable[[], "FastAPI"]) -> None:
        logging.getLogger("twotower.serve").setLevel(logging.INFO)
        self._app = build()

    def __serve_build_asgi_app__(self) -> "FastAPI":
        return self._app

    def check_health(self) -> None:
        """RuntimeError while nothing would be decoded; if it lasts, Ray starts another replica."""
        if (state := self._app.state.service.state) != "ready":
            raise RuntimeError(f"the replica is {state}")


@dataclass(frozen=True, kw_only=True)
class ReplicatedOptions(ServeOptions, EngineOptions, ReplicaOptions):
    """All that a server of replicas is told."""


def run(build: Callable[[], "FastAPI"], options: ReplicatedOptions) -> None:
    """Deploy replicas of the app that `build` makes and serve until a signal.

    build: called in each replica; it and what it holds must be picklable. ValueError without Ray.
    """
    ray, serve = _ray()
    ray.init(address=options.ray_address, log_to_driver=False)
    serve.start(
        proxy_location="EveryNode", http_options={"host": options.host, "port": options.port}
    )
    deploy(build, options)
    print(f"serving at http://{options.host}:{options.port}/v1, page at /", flush=True)
    stopped = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stopped.set())
    stopped.wait()
    if options.ray_address is None:
        _log.info("stopping: running requests get %g s", options.grace_s)
        serve.shutdown()  # replicas finish what they decode
        ray.shutdown()


def deploy(build: Callable[[], "FastAPI"], options: ReplicatedOptions) -> None:
    """Put the replicas up, or replace those of an earlier call one by one; returns when ready."""
    _, serve = _ray()
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="model",
        max_ongoing_requests=options.batch_size + options.max_waiting,
        ray_actor_options={"num_cpus": options.replica_cpus, "num_gpus": options.replica_gpus},
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            # More than share passes: another replica is worth its start.
            "target_ongoing_requests": options.batch_size,
        },
        graceful_shutdown_timeout_s=options.grace_s,
        health_check_period_s=5.0,
    )
    serve.run(deployment.bind(build), name=APP_NAME, route_prefix="/")


def _ray() -> tuple[Any, Any]:
    try:
        import ray
        from ray import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"twotower serve --ray needs {error.name}; pip install '.[ray]'") from None
    return ray, serve
