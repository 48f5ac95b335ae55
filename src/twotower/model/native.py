"""A TwoTower whose decoding passes are one native call each, with the weights of another.

Decides which passes go there: up to `MAX_TOKENS` tokens a row, without gradient. Everything else,
training and long chunks, is the plain model, whose equations these are.
"""

import torch
from torch import Tensor, nn

from twotower.config import MambaSpec
from twotower.kernels import native
from twotower.kernels.int8 import quantise
from twotower.kernels.quantised import Quantised
from twotower.layers.mamba2 import MambaState
from twotower.layers.quantised import QuantisedLinear, QuantisedMatrix
from twotower.model.context_tower import ContextTower
from twotower.model.native_states import Found, Past, Rooms
from twotower.model.precision import Scheme, scheme_of, weight_bits
from twotower.model.state import ContextCache, ContextView, ForwardOutput
from twotower.model.two_tower import PREFILL_CHUNK, TwoTower

# A prompt is read in native passes up to here, then in wide plain chunks: 16 tokens that attend to
# thousands, or weights that stream from memory for every 16, make those faster. The shipped model
# reads the third and fourth thousand in 435 ms so, and in 521 natively (one thread).
_FIRST_WIDE, _FIRST_WIDE_LARGE = 2048, 256
_INT8 = Scheme(weights="int8", activations="int8")
_MAX_TABLES = 64  # remembered times; a block of 16 tokens has 16 masked fractions


class NativeTwoTower(TwoTower):
    """Decodes with the same weights and, but for rounding, the same results.

    The weights must neither change nor move afterwards. Raises ValueError (one line) for a model
    that the library does not know, OSError where it cannot be made.
    """

    draft_cost = 5.0
    prefix_chunk = native.MAX_TOKENS

    def __init__(self, model: TwoTower, is_int8: bool = False) -> None:
        _require_supported(model, is_int8)
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)
        self._is_int8 = is_int8 or scheme_of(model) is not None
        self._modules = dict(model._modules)
        self._modules["context_tower"] = _NativeContextTower(model.context_tower, is_int8)
        self._modules["context_lm_head"] = _NativeLinear(model.context_lm_head, is_int8)
        num_weights = sum(weight.numel() for weight in model.context_tower.parameters())
        self._first_wide = _FIRST_WIDE if num_weights < native.LARGE else _FIRST_WIDE_LARGE
        self._tables: dict[float, native.Modulations] = {}
        if model.denoiser_tower is not None:
            self._denoiser_pass = native.TowerPass(
                model.config.denoiser,
                dict(model.denoiser_tower.named_parameters()),
                is_causal=False,
                matrices=_matrices(model.denoiser_tower, "denoiser_tower", is_int8),
            )
            self._modules["lm_head"] = _NativeLinear(model.lm_head, is_int8)

    def prefill_chunk(self, num_past: int) -> int:
        """Native passes first, wide plain chunks where those are faster; in int8 native ones
        throughout: another pass would read with other weights.
        """
        is_native = self._is_int8 or num_past < self._first_wide
        return native.MAX_TOKENS if is_native else PREFILL_CHUNK

    @torch.no_grad()
    def context_head(self, hidden: Tensor) -> Tensor:
        """`TwoTower.context_head`, without a graph."""
        return super().context_head(hidden)

    @torch.no_grad()
    def denoise(self, block: Tensor, view: ContextView, t: Tensor | None) -> Tensor:
        """`TwoTower.denoise`; the plain one beyond `MAX_TOKENS` tokens a block."""
        if block.shape[1] > native.MAX_TOKENS or self.denoiser_tower is None:
            return super().denoise(block, view, t)
        block = self._checked(block, "block").contiguous()
        hidden = torch.empty(*block.shape, self.config.hidden_size)
        times = [None] * len(block) if t is None else t.tolist()
        for row, time in enumerate(times):
            length = view.num_past if view.lengths is None else int(view.lengths[row])
            past = Past(view.layers, row)
            table = None if time is None else self._table(time)
            self._denoiser_pass(block[row], length, (past.address, None), hidden[row], table)
        logits: Tensor = self.lm_head(hidden)
        return logits

    def _table(self, t: float) -> native.Modulations:
        """Shift, scale and gate of every layer at time t, computed once."""
        if t not in self._tables:
            if len(self._tables) >= _MAX_TABLES:
                self._tables.clear()
            found = self._modulations(torch.tensor([[t]]))
            table = torch.stack([torch.stack([*m]).flatten(1) for m in found])  # (layers, 3, D)
            self._tables[t] = native.Modulations(table)
        return self._tables[t]


class _NativeLinear(nn.Module):
    def __init__(self, linear: nn.Module, is_int8: bool) -> None:
        super().__init__()
        assert isinstance(linear, nn.Linear | QuantisedLinear)
        self.weight = linear.weight
        self._run = native.Linear(_as_matrix(linear.weight, is_int8))

    def forward(self, x: Tensor) -> Tensor:
        weight, has_graph = self.weight, torch.is_grad_enabled()
        if isinstance(weight, Tensor) and has_graph and (x.requires_grad or weight.requires_grad):
            return nn.functional.linear(x, weight)
        return self._run(x)


def _as_matrix(weight: Tensor | QuantisedMatrix, is_int8: bool) -> Tensor | Quantised:
    if isinstance(weight, QuantisedMatrix):
        return weight.matrix
    return quantise(weight) if is_int8 else weight


def _matrices(tower: nn.Module, name: str, is_int8: bool) -> dict[str, Tensor | Quantised]:
    """What of a tower a pass has in int8: what is so already, and all that may be if is_int8."""
    found: dict[str, Tensor | Quantised] = {
        key: module.matrix
        for key, module in tower.named_modules()
        if isinstance(module, QuantisedMatrix)
    }
    for key, weight in tower.named_parameters():
        if is_int8 and weight_bits(f"{name}.{key}", weight.shape, _INT8):
            found[key] = weight
    return found


class _NativeContextTower(ContextTower):
    def __init__(self, tower: ContextTower, is_int8: bool) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(tower.__dict__)
        self._pass = native.TowerPass(
            tower.config,
            dict(tower.named_parameters()),
            is_causal=True,
            matrices=_matrices(tower, "context_tower", is_int8),
        )
        self._rooms = Rooms()

    def _after(
        self, cache: ContextCache, ids: Tensor, counts: Tensor | None, states_every: int | None
    ) -> ForwardOutput:
        num_rows, length = ids.shape
        if length > native.MAX_TOKENS:
            return super()._after(cache, ids, counts, states_every)
        ids = ids.contiguous()
        layers, lengths = cache.layers, cache.lengths.tolist()
        given = [length] * num_rows if counts is None else counts.tolist()
        is_whole = min(given) == length  # every row fills all of its room
        found = Found(self.config, (num_rows, length), states_every is None, is_whole, self._rooms)
        make = torch.empty if is_whole else torch.zeros
        hidden = make(num_rows, length, self.config.hidden_size)
        pasts = [Past(layers, row) for row in range(num_rows)]
        for row, count in enumerate(given):
            if count:
                states = pasts[row].address, found.address(row)
                self._pass(ids[row, :count], lengths[row], states, hidden[row])
            else:
                found.keep(layers, row)
        if states_every is not None:
            return ForwardOutput(hidden, found.states(given))

        def states_after(counts: Tensor) -> list[MambaState]:
            ends = counts.tolist()
            found.make_room()
            for row, end in enumerate(ends):
                self._pass.fill_states(end, pasts[row].address, found.address(row))
            return found.mamba_states(ends)

        return ForwardOutput(hidden, found.states(given), states_after)


def _require_supported(model: TwoTower, is_int8: bool) -> None:
    """ValueError (one line) naming the first thing that the library does not know."""
    config = model.config
    kinds = sorted(set(config.context.pattern) - set(native.KINDS))
    taps = {layer.conv_width for layer in config.context.layers_of(MambaSpec)}
    for name, value, allowed in (
        ("weights", _precision(model), ["float", "int8 x int8", *(["int8"] if is_int8 else [])]),
        ("layers", "".join(kinds), [""]),
        ("device", {p.device.type for p in model.parameters()}, [{"cpu"}]),
        ("dtype", {p.dtype for p in model.parameters()}, [{torch.float32}]),
        ("bidirectional_mamba", config.bidirectional_mamba, [False]),
        ("conv_kernel", max(taps, default=2), range(2, 10)),
    ):
        if value not in allowed:
            raise ValueError(f"the native pass does not know {name}={value}")
    if not all(parameter.is_contiguous() for parameter in model.parameters()):
        raise ValueError("the native pass needs contiguous weights")


def _precision(model: TwoTower) -> str:
    scheme = scheme_of(model)
    if scheme is None:
        return "float"
    return scheme.weights if scheme.activations is None else f"{scheme.weights} x int8"
