"""Machines and what they can: the built-in table, files of one's own, and their checks."""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

from twotower.arguments import ABOVE_ZERO, check, check_fields, nearest, number

Kind = Literal["gpu", "unified", "cpu"]
Compute = Literal["float32", "bfloat16", "int8"]
# Of the memory: what a driver, a system and a framework leave. Unified: the share that a GPU may
# hold by default on such machines.
_USABLE: Mapping[str, float] = {"gpu": 0.92, "unified": 0.75, "cpu": 0.9}
_GIB, _MIB = 2**30, 2**20


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device with its memory; `link_gb_s` leads to a second one of the same kind.

    Speeds are peaks: 10^9 bytes a second, 10^12 operations a second. `price_per_hour` is of one
    device. ValueError (one line) for a value that cannot be.
    """

    name: str
    kind: Kind
    memory_gib: float
    bandwidth_gb_s: float
    tflops: Mapping[str, float] = field(hash=False)
    source: str
    link_gb_s: float | None = None
    host_gib: float | None = None
    host_gb_s: float | None = None
    cache_mib: float | None = None
    cache_gb_s: float | None = None
    price_per_hour: float | None = None
    usable: float | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def usable_bytes(self) -> float:
        """Memory that a program gets."""
        share = _USABLE[self.kind] if self.usable is None else self.usable
        return share * self.memory_gib * _GIB

    @property
    def host_bytes(self) -> float:
        """Memory behind the host link; 0 where there is none."""
        return _USABLE["cpu"] * (self.host_gib or 0.0) * _GIB

    def bytes_per_s(self, weight_bytes: float) -> float:
        """Peak bandwidth of a pass over so many weights: the cache's if they fit into it."""
        if self.cache_mib is not None and weight_bytes <= self.cache_mib * _MIB:
            assert self.cache_gb_s is not None
            return self.cache_gb_s * 1e9
        return self.bandwidth_gb_s * 1e9


def built_in() -> dict[str, Hardware]:
    """The table of this package, by name."""
    text = (resources.files("twotower.lab.plan") / "hardware.toml").read_text(encoding="utf-8")
    return parse_hardware(text, "hardware.toml")


def read_hardware(file: Path) -> dict[str, Hardware]:
    """Machines of a TOML file, by name; ValueError (one line) if it cannot be read or is wrong."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(f"hardware_file: cannot read {file} ({reason})") from None
    return parse_hardware(text, str(file))


def parse_hardware(text: str, where: str) -> dict[str, Hardware]:
    """Machines of a TOML text: a table each, its name the machine's."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where}: not valid TOML ({error}); correct that line") from None
    if not tables:
        raise ValueError(f"{where}: names no machine; add a table like [my-gpu]")
    return {name: _from_table(name, values, where) for name, values in tables.items()}


def find_hardware(name: str, known: Mapping[str, Hardware]) -> Hardware:
    """The machine of that name; ValueError names the nearest."""
    if name not in known:
        raise ValueError(
            f"hardware: {name!r} is unknown{nearest(name, known)}; known are {', '.join(known)}; "
            "others come from --hardware-file"
        )
    return known[name]


def _from_table(name: str, values: object, where: str) -> Hardware:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {name} must be a table; write [{name}] above its values")
    names = {f.name: f for f in fields(Hardware) if f.name != "name"}
    for key in values:
        if key not in names:
            raise ValueError(
                f"{where}: [{name}] has unknown field {key!r}{nearest(key, names)}; "
                f"allowed are {', '.join(names)}"
            )
    missing = [n for n, f in names.items() if f.default is MISSING and n not in values]
    if missing:
        raise ValueError(f"{where}: [{name}] lacks {', '.join(missing)}; add it")
    try:
        return Hardware(name=name, **values)
    except ValueError as error:
        raise ValueError(f"{where}: [{name}] {error}") from None


def _check(hardware: Hardware) -> None:
    if hardware.kind not in get_args(Kind):
        kinds = ", ".join(get_args(Kind))
        raise ValueError(f"kind={hardware.kind!r} is unknown; allowed are {kinds}")
    if not isinstance(hardware.source, str) or not hardware.source.strip():
        raise ValueError("source must say where the figures come from; write a sentence")
    _check_tflops(hardware.tflops)
    speeds = ("memory_gib", "bandwidth_gb_s", "link_gb_s", "host_gib", "host_gb_s")
    optional = {"usable": number(0, 1, is_above=True), "price_per_hour": number(0)}
    caches = ("cache_mib", "cache_gb_s")
    check_fields(hardware, dict.fromkeys((*speeds, *caches), ABOVE_ZERO) | optional)
    for one, other in (("host_gib", "host_gb_s"), ("cache_mib", "cache_gb_s")):
        if (getattr(hardware, one) is None) != (getattr(hardware, other) is None):
            raise ValueError(f"{one} and {other} go together; give both or neither")


def _check_tflops(tflops: object) -> None:
    allowed = get_args(Compute)
    if not isinstance(tflops, Mapping) or not {"float32", "bfloat16"} & set(tflops):
        raise ValueError(f"tflops={tflops!r} must be a table such as {{ bfloat16 = 165 }}")
    for dtype, value in tflops.items():
        if dtype not in allowed:
            raise ValueError(
                f"tflops has unknown dtype {dtype!r}; allowed are {', '.join(allowed)}"
            )
        check({f"tflops.{dtype}": value}, {f"tflops.{dtype}": ABOVE_ZERO})
