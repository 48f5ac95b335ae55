"""A TwoTower whose decoding passes are one native call each, with the weights of another.

Decides which passes go there: up to `MAX_TOKENS` tokens a row, without gradient. Everything else,
training and long chunks, is the plain model, whose equations these are.
"""

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from twotower.config import ATTENTION, MAMBA, ModelConfig
from twotower.kernels import native
from twotower.kernels.int8 import quantise
from twotower.kernels.quantised import Quantised
from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaInputs, MambaState
from twotower.layers.quantised import QuantisedLinear, QuantisedMatrix
from twotower.model.context_tower import ContextTower
from twotower.model.precision import Scheme, scheme_of, weight_bits
from twotower.model.state import ContextCache, ContextView, LayerState, NewState
from twotower.model.two_tower import PREFILL_CHUNK, TwoTower

# Longer ones are read faster in wide plain chunks (1,000 tokens: 257 ms against 286).
_SHORT_PROMPT = 256
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
        self._tables: dict[float, Tensor] = {}
        if model.denoiser_tower is not None:
            self._denoiser_pass = native.TowerPass(
                model.config,
                dict(model.denoiser_tower.named_parameters()),
                is_causal=False,
                matrices=_matrices(model.denoiser_tower, "denoiser_tower", is_int8),
            )
            self._modules["lm_head"] = _NativeLinear(model.lm_head, is_int8)

    @torch.no_grad()
    def prefill(
        self, ids: Tensor, lengths: Tensor | None = None, chunk_size: int | None = None
    ) -> ContextCache:
        """`TwoTower.prefill`; by default in chunks that fit a native pass where that is faster, and
        in int8 always: another pass would read with other weights.
        """
        if chunk_size is None:
            is_native = self._is_int8 or ids.shape[1] <= _SHORT_PROMPT
            chunk_size = native.MAX_TOKENS if is_native else PREFILL_CHUNK
        return super().prefill(ids, lengths, chunk_size)

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
            past = _past(self._denoiser_pass.num_layers, view.layers, row)
            fresh = (native.Fresh * self._denoiser_pass.num_layers)()
            table = None if time is None else self._table(time)
            self._denoiser_pass(block[row], length, (past.addresses, fresh), hidden[row], table)
        logits: Tensor = self.lm_head(hidden)
        return logits

    def _table(self, t: float) -> Tensor:
        """Shift, scale and gate of every layer (layers, 3, D) at time t, computed once."""
        if t not in self._tables:
            if len(self._tables) >= _MAX_TABLES:
                self._tables.clear()
            found = self._modulations(torch.tensor([[t]]))
            self._tables[t] = torch.stack([torch.stack([*m]).flatten(1) for m in found])
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
        self._decays = {
            index: -value.detach().exp()
            for index, layer in enumerate(tower.each_layer())
            if isinstance(value := getattr(layer.mixer, "A_log", None), Tensor)
        }

    def _after(
        self, cache: ContextCache, ids: Tensor, counts: Tensor | None, states_every: int | None
    ) -> tuple[Tensor, list[NewState]]:
        num_rows, length = ids.shape
        if length > native.MAX_TOKENS:
            return super()._after(cache, ids, counts, states_every)
        ids = ids.contiguous()
        layers, lengths = cache.layers, cache.lengths.tolist()
        given = [length] * num_rows if counts is None else counts.tolist()
        found = _Found(self.config, num_rows, length, keeps_inputs=states_every is None)
        hidden = torch.zeros(num_rows, length, self.config.hidden_size)
        for row, count in enumerate(given):
            if count:
                past = _past(self._pass.num_layers, layers, row)
                self._pass(
                    ids[row, :count],
                    lengths[row],
                    (past.addresses, found.addresses(row)),
                    hidden[row],
                )
            else:
                found.keep(layers, row)
        return hidden, found.states(layers, given, self._decays)


class _Past:
    """Addresses of one row's state, and the tensors that they point into."""

    def __init__(self, num_layers: int) -> None:
        self.addresses = (native.Past * num_layers)()
        self.kept: list[Tensor] = []


def _past(num_layers: int, layers: tuple[LayerState, ...], row: int) -> _Past:
    """Where the state of one row lies: KV with leading (B, S), Mamba with (B,) or (B, 1)."""
    past = _Past(num_layers)
    for address, state in zip(past.addresses, layers, strict=True):
        if isinstance(state, KV):
            address.k, address.v = (_row_address(part, row, past) for part in state)
        elif isinstance(state, MambaState):
            conv = state.conv.mT if state.conv.dim() == 3 else state.conv.squeeze(1).mT
            address.conv = _row_address(conv, row, past)
            address.ssm = _row_address(state.ssm, row, past)
    return past


def _row_address(value: Tensor, row: int, past: _Past) -> int:
    """Where row `row` of value (B, ...) begins; of a copy if the row is not in one piece."""
    part = value[row]
    if not part.is_contiguous():
        part = part.contiguous()
        past.kept.append(part)
    return part.data_ptr()


class _Found:
    """Room for what a context pass leaves behind, and the states made of it."""

    def __init__(self, config: ModelConfig, num_rows: int, length: int, keeps_inputs: bool) -> None:
        c = config
        kinds = c.hybrid_override_pattern
        self._kinds, self._config, self._length, self._keeps_inputs = kinds, c, length, keeps_inputs
        self._kv = torch.zeros(
            kinds.count(ATTENTION), 2, num_rows, length, c.num_key_value_heads, c.head_dim
        )
        mambas = kinds.count(MAMBA), num_rows
        self._window = torch.zeros(*mambas, c.conv_kernel - 1 + length, c.conv_channels)
        self._mixed = torch.zeros(*mambas, length, c.conv_channels)
        self._step = torch.zeros(*mambas, length, c.mamba_num_heads)
        self._ssm = torch.empty(*mambas, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size)

    def addresses(self, row: int) -> ctypes.Array[native.Fresh]:
        """Where the pass of one row writes."""
        fresh = (native.Fresh * len(self._kinds))()
        attention = mamba = 0
        for address, kind in zip(fresh, self._kinds, strict=True):
            if kind == ATTENTION:
                address.k = _address(self._kv, attention, 0, row)
                address.v = _address(self._kv, attention, 1, row)
                attention += 1
            elif kind == MAMBA:
                address.window = _address(self._window, mamba, row)
                address.mixed = _address(self._mixed, mamba, row)
                address.step = _address(self._step, mamba, row)
                address.ssm = None if self._keeps_inputs else _address(self._ssm, mamba, row)
                mamba += 1
        return fresh

    def keep(self, layers: tuple[LayerState, ...], row: int) -> None:
        """A row without tokens: its state stays as it was."""
        mambas = [state for state in layers if isinstance(state, MambaState)]
        for index, state in enumerate(mambas):
            self._window[index, row, : self._config.conv_kernel - 1] = state.conv[row].mT
            self._ssm[index, row] = state.ssm[row]

    def states(
        self, layers: tuple[LayerState, ...], counts: list[int], decays: Mapping[int, Tensor]
    ) -> list[NewState]:
        """Each layer's new state, or its inputs, after counts[b] tokens of each row b."""
        states: list[NewState] = []
        attention = mamba = 0
        for index, kind in enumerate(self._kinds):
            old = layers[index]
            if kind == ATTENTION:
                states.append(KV(self._kv[attention, 0], self._kv[attention, 1]))
                attention += 1
            elif isinstance(old, MambaState):
                states.append(
                    self._inputs(mamba, decays[index], old.ssm)
                    if self._keeps_inputs
                    else self._state(mamba, counts)
                )
                mamba += 1
            else:
                states.append(None)
        return states

    def _inputs(self, mamba: int, decay: Tensor, ssm: Tensor) -> MambaInputs:
        c, width = self._config, self._config.mamba_width
        mixed, groups = self._mixed[mamba], c.n_groups * c.ssm_state_size
        heads = mixed[..., :width].unflatten(-1, (c.mamba_num_heads, c.mamba_head_dim))
        B = mixed[..., width : width + groups].unflatten(-1, (c.n_groups, c.ssm_state_size))
        A = decay.expand(len(mixed), 1, -1)
        return MambaInputs(self._window[mamba], heads, self._step[mamba], A, B, ssm)

    def _state(self, mamba: int, counts: list[int]) -> MambaState:
        window, kept = self._window[mamba], self._config.conv_kernel - 1
        if min(counts) == max(counts):
            conv = window[:, counts[0] : counts[0] + kept]
        else:
            conv = torch.stack([window[b, n : n + kept] for b, n in enumerate(counts)])
        return MambaState(conv.mT.unsqueeze(1), self._ssm[mamba].unsqueeze(1))


def _address(value: Tensor, *index: int) -> int:
    """Where value[index] begins; float32."""
    strides = value.stride()
    return value.data_ptr() + 4 * sum(i * s for i, s in zip(index, strides, strict=False))


def _require_supported(model: TwoTower, is_int8: bool) -> None:
    """ValueError (one line) naming the first thing that the library does not know."""
    config = model.config
    kinds = sorted(set(config.hybrid_override_pattern) - set(native.KINDS))
    for name, value, allowed in (
        ("weights", _precision(model), ["float", "int8 x int8", *(["int8"] if is_int8 else [])]),
        ("layers", "".join(kinds), [""]),
        ("device", {p.device.type for p in model.parameters()}, [{"cpu"}]),
        ("dtype", {p.dtype for p in model.parameters()}, [{torch.float32}]),
        ("bidirectional_mamba", config.bidirectional_mamba, [False]),
        ("conv_kernel", config.conv_kernel, range(2, 10)),
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
