"""The table of machines, files of one's own, and every way in which they can be wrong."""

from dataclasses import replace
from pathlib import Path

import pytest

from tiny_plan import machine
from twotower.lab.plan.hardware import built_in, find_hardware, parse_hardware, read_hardware
from twotower.lab.plan.inputs import DEFAULTS, PROFILES, Efficiency, Widths, uniform

GOOD = """
[mine]
kind = "gpu"
memory_gib = 10
bandwidth_gb_s = 500
tflops = { bfloat16 = 100 }
source = "its box"
"""


def test_the_built_in_table() -> None:
    """Silent failure: a figure nobody knows the origin of, or a unit that is off by thousands."""
    known = built_in()
    assert {"h100-sxm", "rtx-4090", "m3-ultra", "dgx-spark", "epyc-9654"} <= set(known)
    assert {found.kind for found in known.values()} == set(DEFAULTS)
    for name, found in known.items():
        assert found.name == name and len(found.source) > 8
        assert 10 < found.bandwidth_gb_s < 20_000 and 0.01 < max(found.tflops.values()) < 10_000
        # Arithmetic outruns memory on every machine: operations per byte.
        assert 1 < 1e3 * max(found.tflops.values()) / found.bandwidth_gb_s < 1000


def test_usable_memory_goes_by_kind() -> None:
    gib = 2**30
    sizes = {k: machine(kind=k, memory_gib=100, usable=None).usable_bytes / gib for k in DEFAULTS}
    assert sizes == {"gpu": 92, "unified": 75, "cpu": 90}
    assert machine(memory_gib=100, usable=0.5).usable_bytes == 50 * gib
    assert machine().host_bytes == 0
    assert machine(host_gib=100, host_gb_s=1).host_bytes == pytest.approx(90 * gib)


def test_a_cache_serves_what_fits_into_it() -> None:
    cached = machine(cache_mib=2, cache_gb_s=8)
    assert cached.bytes_per_s(2 * 2**20) == 8e9
    assert cached.bytes_per_s(2 * 2**20 + 1) == 1e9
    assert machine().bytes_per_s(1) == 1e9


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(GOOD)
    (found,) = read_hardware(file).values()
    assert (found.name, found.memory_gib, found.tflops["bfloat16"]) == ("mine", 10, 100)
    assert found.price_per_hour is None and found.link_gb_s is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("kind", "kimd"), "unknown field 'kimd', perhaps kind"),
        (('"gpu"', '"tpu"'), "kind='tpu' is unknown; allowed are gpu, unified, cpu"),
        (("memory_gib = 10", ""), "lacks memory_gib; add it"),
        (("memory_gib = 10", "memory_gib = -1"), "memory_gib=-1 must be above 0"),
        (("memory_gib = 10", "memory_gib = true"), "memory_gib=True must be a number"),
        (("memory_gib = 10", "memory_gib = nan"), "memory_gib=nan must be a finite number above 0"),
        (("500", '"fast"'), "bandwidth_gb_s='fast' must be a number"),
        (("{ bfloat16 = 100 }", "100"), "tflops=100 must be a table such as"),
        (("bfloat16", "int8"), "must be a table such as"),
        (("bfloat16 = 100", "bfloat16 = 100, fp8 = 1"), "unknown dtype 'fp8'"),
        (("= 100", "= 0"), "tflops.bfloat16=0 must be above 0"),
        (('"its box"', '" "'), "source must say where the figures come from"),
        (("[mine]", "[mine]\nusable = 1.5"), "usable=1.5 must be above 0 and at most 1"),
        (("[mine]", "[mine]\nprice_per_hour = -1"), "price_per_hour=-1 must be at least 0"),
        (("[mine]", "[mine]\nhost_gib = 5"), "host_gib and host_gb_s go together"),
        (("[mine]", "[mine]\ncache_gb_s = 5"), "cache_mib and cache_gb_s go together"),
        (("[mine]", ""), "kind must be a table; write [kind] above"),
        (("[mine]", "[mine"), "not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_in_a_line(change: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse_hardware(GOOD.replace(*change), "mine.toml")
    assert message in str(refusal.value) and str(refusal.value).startswith("mine.toml: ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*gone.toml \(No such file"):
        read_hardware(tmp_path / "gone.toml")
    (tmp_path / "odd.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"cannot read .*odd.toml \(not UTF-8\)"):
        read_hardware(tmp_path / "odd.toml")
    with pytest.raises(ValueError, match=r"empty\.toml: names no machine"):
        parse_hardware("", "empty.toml")


def test_an_unknown_machine_names_the_nearest() -> None:
    known = built_in()
    assert find_hardware("l4", known).memory_gib == 24
    for name, close in (("h100", "h100-sxm"), ("H100-SMX", "h100-sxm"), ("m3ultra", "m3-ultra")):
        with pytest.raises(ValueError, match=f"hardware: '{name}' is unknown, perhaps {close};"):
            find_hardware(name, known)
    with pytest.raises(ValueError, match="'abacus' is unknown; known are h100-sxm"):
        find_hardware("abacus", known)


def test_efficiency_is_a_share() -> None:
    said = {"bandwidth": "bandwidth_share=0.0", "arithmetic": "arithmetic_share=1.1"}
    said |= {"layer_s": "layer_us=-1.0 must"}
    for field, value in (("bandwidth", 0.0), ("arithmetic", 1.1), ("layer_s", -1e-6)):
        values = {"bandwidth": 1.0, "arithmetic": 1.0, "layer_s": 0.0} | {field: value}
        with pytest.raises(ValueError, match=said[field]):
            Efficiency(**values)
    assert set(DEFAULTS.values()) <= set(PROFILES)


def test_bytes_of_a_weight_by_part() -> None:
    """Silent failure: a router in four bits, which breaks the choice of experts."""
    mixed = Widths(experts="int4", projections="int8", head="float32", dtype="bfloat16")
    sizes: dict[str, float] = {"moe routed": 0.625, "moe shared": 0.625, "moe router": 4}
    sizes |= {"mamba": 1, "attention": 1, "mlp": 1, "head": 4}
    sizes |= {"norms": 2, "embeddings": 2, "time conditioning": 2}
    assert {kind: mixed.weight_bytes(kind) for kind in sizes} == sizes
    assert mixed.cache_bytes == 2 and uniform("float32").cache_bytes == 4
    assert (uniform("int4").dtype, uniform("int4").head) == ("bfloat16", "int8")
    assert uniform("float32").weight_bytes("norms") == 4
    with pytest.raises(ValueError, match="head_weights: int4 breaks the choice of tokens"):
        replace(mixed, head="int4")
