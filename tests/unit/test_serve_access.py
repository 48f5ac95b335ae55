"""Who may call the server and how often: options, keys, limits."""

from pathlib import Path

import pytest

from twotower.serve.access import Keys, Limits, check_exposure, read_keys
from twotower.serve.errors import ApiError
from twotower.serve.options import ServeOptions
from twotower.serve.service import read_filters


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": 70000}, "port=70000 must be between 0 and 65535"),
        ({"max_body_bytes": 0}, "max_body_bytes=0 must be at least 1"),
        ({"key_concurrency": 0}, "key_concurrency=0 must be at least 1"),
        ({"deadline_s": 0.0}, "deadline_s=0.0 must be a finite number above 0"),
        ({"body_timeout_s": float("nan")}, "body_timeout_s=nan must be a finite number above 0"),
        ({"grace_s": -1.0}, "grace_s=-1.0 must be a finite number, at least 0"),
        ({"cors_origins": ("example.org",)}, "must be [*] or begin with http"),
    ],
)
def test_bad_options_are_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServeOptions(**given)  # type: ignore[arg-type]  # bad on purpose


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_a_loopback_address_needs_no_key(host: str) -> None:
    check_exposure(ServeOptions(host=host), Keys({}))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "myhost"])
def test_a_reachable_address_needs_a_key_or_consent(host: str) -> None:
    """Guards against a model that the whole network can use by accident."""
    with pytest.raises(ValueError, match=f"host={host} can be reached"):
        check_exposure(ServeOptions(host=host), Keys({}))
    check_exposure(ServeOptions(host=host, insecure=True), Keys({}))
    check_exposure(ServeOptions(host=host), Keys({b"digest": "anna"}))


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# people\nanna secret-of-anna\n\nsecret-of-bob\n")
    options = ServeOptions(api_keys_file=file, api_keys_env="KEYS")
    keys = read_keys(options, {"KEYS": "clara secret-of-clara,secret-of-dan"})
    assert keys.caller("Bearer secret-of-anna") == "anna"
    assert keys.caller("bearer  secret-of-bob ") == "key-2"
    assert keys.caller("Bearer secret-of-clara") == "clara"
    assert keys.caller("Bearer secret-of-dan") == "key-4"
    for header in (None, "", "Bearer", "Bearer secret-of-ann", "Basic secret-of-anna", "\udcff"):
        assert keys.caller(header) is None
    assert b"secret" not in repr(keys).encode()


@pytest.mark.parametrize(
    "text", ["", "# none\n", "short\n", "anna two words\n", "k\u00e9y-of-anna\n"]
)
def test_files_without_a_usable_key_are_refused(text: str, tmp_path: Path) -> None:
    """Guards against a server that believes it has keys."""
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ValueError, match="key"):
        read_keys(ServeOptions(api_keys_file=file), {})
    with pytest.raises(ValueError, match="api_keys_file: cannot read"):
        read_keys(ServeOptions(api_keys_file=tmp_path / "none"), {})
    with pytest.raises(ValueError, match="the variable KEYS holds no key"):
        read_keys(ServeOptions(api_keys_env="KEYS"), {})


def test_limits_of_a_minute_and_at_a_time() -> None:
    now = 100.0
    limits = Limits(2, 3, lambda: now)
    limits.enter("anna")
    limits.enter("anna")
    with pytest.raises(ApiError, match="2 requests at a time"):
        limits.enter("anna")
    limits.enter("bob")  # another's limit is another
    limits.leave("anna")
    now = 110.0
    limits.enter("anna")
    limits.leave("anna")
    with pytest.raises(ApiError, match="3 requests a minute") as refused:
        limits.enter("anna")
    assert refused.value.headers == {"Retry-After": "50"}
    now = 160.0  # the first two are 60 s old
    limits.enter("anna")


def test_idle_callers_are_forgotten() -> None:
    """Guards against memory that grows with every address that ever called."""
    now = 0.0
    limits = Limits(None, 5, lambda: now)
    limits.enter("busy")
    for number in range(20_000):
        now += 0.01  # 6,000 of them are within a minute of one another
        limits.enter(str(number))
        limits.leave(str(number))
    assert len(limits._callers) < 2 * 6_001 and "busy" in limits._callers


def test_filters_are_patterns_or_functions() -> None:
    pattern, function = read_filters(["48[:]4", "textwrap:dedent"])
    assert (pattern.name, function.name) == ("48[:]4", "textwrap:dedent")
    with pytest.raises(ValueError, match="regular expression"):
        read_filters(["("])
