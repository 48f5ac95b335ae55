"""The server under load and fault: queues, deadlines, keys, names of hosts, stops, dead threads."""

import asyncio
import ctypes
import signal
import threading
import time

import pytest

from raw_http import LONG, SHORT, URL, client_of, error_of, stream, wait_for
from serving import running, tiny
from twotower.engine import WorkerStats
from twotower.engine.batch import Group
from twotower.engine.faults import EngineDeadError
from twotower.engine.scheduler import Scheduler
from twotower.serve.access import read_keys
from twotower.serve.options import ServeOptions


def test_a_full_queue_refuses_and_takes_back_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against unbounded waiting, and against half of a request that stays in the queue."""
    # A row that had a turn is not counted as waiting: the queue would be full for 8 steps alone.
    monkeypatch.setattr("twotower.engine.shared_queue.TURN", 10**6)
    with running(loaded=tiny(), batch_size=1, max_waiting=2) as server, server.client() as client:
        endless = {**LONG, "stream": True}
        with client.stream("POST", URL, json=endless), client.stream("POST", URL, json=endless):
            wait_for(lambda: is_full(server.worker.stats()))
            refused = client.post(URL, json={**SHORT, "n": 2})
            assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
            assert error_of(refused)["code"] == "queue_full"
            never = client.post(URL, json={**SHORT, "n": 3})
            assert never.status_code == 400 and error_of(never)["param"] == "n"
        server.wait_until_idle()
        assert server.worker.stats().num_finished == 0, "a row of the refused request was decoded"
        assert client.post(URL, json=SHORT).status_code == 200


def test_a_deadline_ends_a_request_with_504() -> None:
    with running(loaded=tiny(), deadline_s=0.3) as server, server.client() as client:
        for body in (LONG, {**LONG, "deadline_s": 600}):
            late = client.post(URL, json=body)
            assert late.status_code == 504 and error_of(late)["code"] == "deadline"
            assert late.headers["x-should-retry"] == "false"
        records = stream(client, {**LONG, "stream": True})
        assert records[-2]["error"]["code"] == "deadline" and records[-1] == "[DONE]"
        server.wait_until_idle()


def test_keys_are_asked_for_and_limited_one_by_one() -> None:
    keys = read_keys(ServeOptions(api_keys_env="K"), {"K": "anna key-of-anna, key-of-somebody"})
    with (
        running(keys, tiny(), key_requests_per_minute=2) as server,
        server.client() as client,
    ):
        anna = {"Authorization": "Bearer key-of-anna"}
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "key-of-anna"}):
            refused = client.post(URL, json=SHORT, headers=header)
            assert refused.status_code == 401 and error_of(refused)["code"] == "invalid_api_key"
        assert client.get("/metrics").status_code == 401
        assert client.get("/health").status_code == 200
        for _ in range(2):
            assert client.post(URL, json=SHORT, headers=anna).status_code == 200
        limited = client.post(URL, json=SHORT, headers=anna)
        assert limited.status_code == 429 and error_of(limited)["code"] == "key_rate"
        assert 1 <= int(limited.headers["Retry-After"]) <= 60
        other = {"Authorization": "Bearer key-of-somebody"}
        assert client.post(URL, json=SHORT, headers=other).status_code == 200
        assert client.get("/metrics", headers=anna).status_code == 200


def test_one_key_may_have_so_many_requests_at_a_time() -> None:
    keys = read_keys(ServeOptions(api_keys_env="K"), {"K": "anna key-of-anna"})
    anna = {"Authorization": "Bearer key-of-anna"}
    with running(keys, tiny(), key_concurrency=1) as server, server.client(headers=anna) as client:
        thread = threading.Thread(target=client_of(server, LONG, 0.7, anna))
        thread.start()
        wait_for(lambda: server.worker.stats().rows_in_flight == 1)
        refused = client.post(URL, json=SHORT)
        assert refused.status_code == 429 and error_of(refused)["code"] == "key_concurrency"
        thread.join()
        server.wait_until_idle()
        assert client.post(URL, json=SHORT).status_code == 200, "the slot was not freed"


@pytest.mark.parametrize("is_wanted", [False, True])
def test_prompts_are_logged_only_when_asked(
    is_wanted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against logs that hold what callers wrote, and against lines that they forge."""
    caplog.set_level("DEBUG", "twotower.serve")
    with running(loaded=tiny(), log_prompts=is_wanted) as server, server.client() as client:
        body = {**SHORT, "prompt": "The clock", "user": "someone\nrequest=fake"}
        assert client.post(URL, json=body).status_code == 200
    (line,) = [m for m in caplog.messages if f"path={URL}" in m]
    assert ("The clock" in line) == is_wanted
    assert r"user='someone\nrequest=fake'" in line and "rows=1" in line and "\n" not in line


def test_a_name_of_this_machine_may_be_allowed() -> None:
    """Guards a flag: names of hosts know no capitals."""
    names = ("Box.Example",)
    with running(loaded=tiny(), allowed_hosts=names) as server, server.client() as client:
        for host in ("box.example", "BOX.example:8000", "localhost"):
            answer = client.get("/v1/models", headers={"Host": host})
            assert answer.status_code == 200, host
        assert client.get("/v1/models", headers={"Host": "example"}).status_code == 403


def test_a_request_that_names_no_length_keeps_the_limit() -> None:
    """Guards against a checkpoint's default that is more than anyone may ask for."""
    with running(loaded=tiny(), max_new_tokens=3) as server, server.client() as client:
        usage = client.post(URL, json={"prompt": "The", "ignore_eos": True}).json()["usage"]
        assert usage["completion_tokens"] == 3


def test_named_origins_may_call() -> None:
    origin = "https://app.example"
    with running(loaded=tiny(), cors_origins=(origin,)) as server, server.client() as client:
        answer = client.post(URL, json=SHORT, headers={"Origin": origin})
        assert answer.headers["access-control-allow-origin"] == origin
        other = client.post(URL, json=SHORT, headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
        assert client.options(URL, headers=asked).status_code == 200
        foreign = client.options(URL, headers={**asked, "Origin": "https://evil.example"})
        assert foreign.status_code == 400


def test_a_stop_finishes_short_rows_and_tells_long_ones() -> None:
    """Guards against clients who wait for a server that has gone."""
    with running(loaded=tiny(), grace_s=0.5) as server:
        answers: list[list[object]] = []

        def ask(body: dict[str, object]) -> None:
            with server.client() as client:
                answers.append(stream(client, {**body, "stream": True}))

        threads = [
            threading.Thread(target=ask, args=({**LONG, "max_tokens": count},))
            for count in (3, 4000)
        ]
        for thread in threads:
            thread.start()
        # The short one may have ended before it is looked at.
        wait_for(lambda: _num_begun(server.worker.stats()) == 2)
        asyncio.run(server.service.stop())
        for thread in threads:
            thread.join()
        short, long = sorted(answers, key=len)
        assert short[-2]["choices"][0]["finish_reason"] == "length"  # type: ignore[index]
        assert long[-2]["error"]["code"] == "stopped"  # type: ignore[index]
        with server.client() as client:
            late = client.post(URL, json=SHORT)
            assert late.status_code == 503 and "Retry-After" in late.headers
            assert client.get("/ready").json() == {"status": "stopping"}
            assert client.get("/health").status_code == 200


def _num_begun(stats: WorkerStats) -> int:
    return stats.rows_in_flight + stats.num_finished


def test_a_second_signal_ends_the_grace() -> None:
    """Guards against a server that cannot be ended while somebody is served."""
    with running(loaded=tiny(), grace_s=300.0, max_new_tokens=10**6) as server:
        endless = {**LONG, "max_tokens": 10**6}
        thread = threading.Thread(target=client_of(server, endless, 60))
        thread.start()
        wait_for(lambda: server.worker.stats().rows_in_flight == 1)
        server.server.handle_exit(signal.SIGTERM, None)
        wait_for(lambda: server.service.is_stopping)
        assert server.worker.stats().rows_in_flight == 1
        server.server.handle_exit(signal.SIGTERM, None)
        server.wait_until_idle(5.0)
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_a_dead_worker_is_started_again() -> None:
    """Guards against a server that stays up and answers nobody."""
    with running(loaded=tiny()) as server, server.client() as client:
        thread = threading.Thread(target=client_of(server, LONG, 10))
        thread.start()
        wait_for(lambda: server.worker.stats().rows_in_flight == 1)
        kill_thread("twotower-worker")
        thread.join(timeout=10)
        assert not thread.is_alive(), "the row of the dead thread was not told"
        wait_for(lambda: client.get("/ready").status_code == 200)
        assert client.post(URL, json=SHORT).status_code == 200
        assert "twotower_worker_restarts_total 1.0" in client.get("/metrics").text


def test_a_dead_worker_is_not_ready_and_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a server that looks ready, or starts its thread again and again, while
    nothing can be decoded: the other rank is lost.
    """

    def lost(scheduler: Scheduler, group: Group) -> object:
        if group.rows:
            raise EngineDeadError("lost the other rank")
        return iter(())

    monkeypatch.setattr(Scheduler, "_prefill", lost)
    with running(loaded=tiny()) as server, server.client() as client:
        told = client.post(URL, json=SHORT)
        assert told.status_code == 503 and "nothing can be decoded" in str(error_of(told))
        time.sleep(0.6)  # the thread would be started again by now
        ready = client.get("/ready")
        assert ready.status_code == 503 and ready.json() == {"status": "failed"}
        later = client.post(URL, json=SHORT)
        assert later.status_code == 503 and "nothing can be decoded" in str(error_of(later))
        metrics = client.get("/metrics").text
        assert "twotower_worker_alive 0.0" in metrics
        assert "twotower_worker_restarts_total 0.0" in metrics
        assert client.get("/health").status_code == 200


def is_full(stats: WorkerStats) -> bool:
    return (stats.rows_in_flight, stats.rows_waiting) == (1, 1)


def kill_thread(name: str) -> None:
    """Raise SystemExit in the newest thread of that name: the nearest that Python has to killing
    one.
    """
    thread = [thread for thread in threading.enumerate() if thread.name == name][-1]
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
    )
