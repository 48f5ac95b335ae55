"""Bytes of weights, cache and activations, and where towers go so that they fit.

A tower stays whole on one device. Where a GPU is too small, a share of the routed experts lives in
host memory and crosses the link in every pass that needs it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from twotower.checkpoint.inspect import Tower
from twotower.lab.plan.inputs import Mode, Widths, Workload
from twotower.lab.plan.passes import EXPERTS, ModelShape, PlanSetup
from twotower.specs import AttentionSpec, LayerSpec, MambaSpec, MoESpec

# Prompts are read as the engine does: so many tokens of so many rows in a pass.
CHUNK, NEWCOMERS = 512, 16
_ROUNDING = 1e-12  # a device that is filled to the brim fits
_STREAMS = 4  # copies of the hidden state that a layer holds: residual, normed, mixer's in and out


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """What one device must hold, in bytes, and what it has."""

    towers: tuple[Tower, ...]
    dense: float
    experts: float
    cache: float
    activations: float
    usable: float

    @property
    def total(self) -> float:
        return self.dense + self.experts + self.cache + self.activations

    @property
    def fits(self) -> bool:
        return self.total <= self.usable * (1 + _ROUNDING)


@dataclass(frozen=True, kw_only=True)
class DeviceMap:
    """Towers by device; `host_share` of each device's routed experts is in host memory."""

    devices: tuple[DeviceMemory, ...]
    host_share: tuple[float, ...]
    host_bytes: float
    host_room: float

    @property
    def fits(self) -> bool:
        return all(d.fits for d in self.devices) and self.host_bytes <= self.host_room

    @property
    def name(self) -> str:
        count = "one device" if len(self.devices) == 1 else "two devices"
        if not any(self.host_share):
            return count
        shares = " and ".join(f"{share:.0%}" for share in self.host_share)
        return f"{count}, {shares} of the experts in host memory"

    def share_of(self, tower: Tower) -> float:
        """Share of the tower's routed experts that is in host memory."""
        places = zip(self.devices, self.host_share, strict=True)
        return next(share for device, share in places if tower in device.towers)


def tower_bytes(shape: ModelShape, tower: Tower, widths: Widths) -> tuple[float, float]:
    """Bytes of a tower's weights: all but the routed experts; the routed experts."""
    sizes = {k: n * widths.weight_bytes(k) for k, n in shape.parameters[tower].items()}
    experts = sizes.pop(EXPERTS, 0.0)
    return sum(sizes.values()), experts


def cache_bytes(shape: ModelShape, rows: int, length: int, widths: Widths) -> float:
    """Bytes of the context cache of `rows` rows of `length` tokens."""
    tower = shape.config.context
    keys = tower.kv_elements * length * widths.kv_bytes
    return rows * (keys + tower.conv_elements * widths.cache_bytes + 4.0 * tower.ssm_elements)


def activation_bytes(setup: PlanSetup, workload: Workload, tower: Tower, mode: Mode) -> float:
    """Peak of what a pass holds beside weights and cache: an estimate from widths.

    The tokens of a pass over prompts or over a block of every row, whichever is more; float32
    logits of a block in a pass that makes them, of a token in the others.
    """
    config, block = setup.shape.config, workload.block_size
    tokens = workload.batch_size * (1 if mode == "ar" else block)
    if tower == "context":
        rows = min(workload.batch_size, NEWCOMERS)
        tokens = max(tokens, rows * min(workload.prompt_tokens, CHUNK))
    makes_block = tower == "denoiser" or mode == "speculative"
    vocab = config.draft_vocab_size if tower == "denoiser" else config.vocab_size
    logits = workload.batch_size * (block if makes_block else 1) * vocab * 4.0
    hidden = config.hidden_size
    width = _STREAMS * hidden + max(_mixer_width(spec, hidden) for spec in config.context.layers)
    return tokens * width * setup.widths.cache_bytes + logits


def _mixer_width(spec: LayerSpec, width: int) -> int:
    """Numbers of a token inside a mixer."""
    if isinstance(spec, MambaSpec):
        return spec.width + spec.conv_channels + spec.num_heads
    if isinstance(spec, AttentionSpec):
        return (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    if isinstance(spec, MoESpec):
        chosen = spec.experts_per_token * (spec.intermediate_size + (spec.latent_size or width))
        return chosen + spec.shared_intermediate_size
    return spec.intermediate_size


def device_maps(
    setup: PlanSetup, workload: Workload, mode: Mode, num_devices: int
) -> Iterator[DeviceMap]:
    """Every way to place the towers that the mode needs, whether it fits or not."""
    if mode == "ar":
        yield _place(setup, workload, mode, [("context",)])
        return
    yield _place(setup, workload, mode, [("context", "denoiser")])
    if num_devices > 1:
        yield _place(setup, workload, mode, [("context",), ("denoiser",)])


def _place(
    setup: PlanSetup, workload: Workload, mode: Mode, groups: Sequence[tuple[Tower, ...]]
) -> DeviceMap:
    devices, shares, host_bytes = [], [], 0.0
    for towers in groups:
        device, share = _fill_device(setup, workload, mode, towers)
        devices.append(device)
        shares.append(share)
        host_bytes += sum(share * tower_bytes(setup.shape, t, setup.widths)[1] for t in towers)
    return DeviceMap(
        devices=tuple(devices),
        host_share=tuple(shares),
        host_bytes=host_bytes,
        host_room=setup.hardware.host_bytes,
    )


def _fill_device(
    setup: PlanSetup, workload: Workload, mode: Mode, towers: tuple[Tower, ...]
) -> tuple[DeviceMemory, float]:
    """A device with its towers, and the share of their experts that had to go to the host."""
    sizes = [tower_bytes(setup.shape, tower, setup.widths) for tower in towers]
    dense, experts = (sum(column) for column in zip(*sizes, strict=True))
    length = workload.prompt_tokens + workload.new_tokens + workload.block_size
    cache = cache_bytes(setup.shape, workload.batch_size, length, setup.widths)
    activations = max(activation_bytes(setup, workload, tower, mode) for tower in towers)
    usable = setup.hardware.usable_bytes
    room = usable - dense - cache - activations
    share = 0.0
    if experts and experts > room and setup.hardware.host_gb_s is not None:
        # One layer's experts need a place to arrive in; all layers that have some are alike.
        arriving = experts / sum(len(setup.shape.tower(t).layers_of(MoESpec)) for t in towers)
        share = 1.0 - max(0.0, room - arriving) / experts
        experts = max(room, arriving)
    return DeviceMemory(
        towers=towers,
        dense=dense,
        experts=experts,
        cache=cache,
        activations=activations,
        usable=usable,
    ), share
