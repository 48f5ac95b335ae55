"""Names and shapes of the released files, derived from their description, not from the code."""

import torch

from twotower.checkpoint import names
from twotower.families import FAMILIES, PRESETS, config_from_dict
from twotower.model.two_tower import TwoTower

NEMOTRON_H = FAMILIES["nemotron_h"]
WIDTH, VOCAB, INNER, CONV = 2688, 131072, 64 * 64, 64 * 64 + 2 * 8 * 128
MAMBA = {
    "in_proj.weight": (INNER + CONV + 64, WIDTH),
    "conv1d.weight": (CONV, 1, 4),
    "conv1d.bias": (CONV,),
    "dt_bias": (64,),
    "A_log": (64,),
    "D": (64,),
    "norm.weight": (INNER,),
    "out_proj.weight": (WIDTH, INNER),
}
ATTENTION = {
    "q_proj.weight": (32 * 128, WIDTH),
    "k_proj.weight": (2 * 128, WIDTH),
    "v_proj.weight": (2 * 128, WIDTH),
    "o_proj.weight": (WIDTH, 32 * 128),
}
MOE = {
    "gate.weight": (128, WIDTH),
    "gate.e_score_correction_bias": (128,),
    "shared_experts.up_proj.weight": (3712, WIDTH),
    "shared_experts.down_proj.weight": (WIDTH, 3712),
    **{f"experts.{e}.up_proj.weight": (1856, WIDTH) for e in range(128)},
    **{f"experts.{e}.down_proj.weight": (WIDTH, 1856) for e in range(128)},
}


def expected_30b() -> dict[str, tuple[int, ...]]:
    pattern = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
    tensors: dict[str, tuple[int, ...]] = {
        "context_lm_head.weight": (VOCAB, WIDTH),
        "lm_head.weight": (VOCAB, WIDTH),
        "t_embedder.mlp.0.weight": (WIDTH, 256),
        "t_embedder.mlp.0.bias": (WIDTH,),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "t_embedder.mlp.2.bias": (WIDTH,),
        "t_block.1.weight": (3 * WIDTH, WIDTH),
        "t_block.1.bias": (3 * WIDTH,),
    }
    for tower in ("context_tower", "denoiser_tower"):
        tensors[f"{tower}.embeddings.weight"] = (VOCAB, WIDTH)
        tensors[f"{tower}.norm_f.weight"] = (WIDTH,)
        for i, kind in enumerate(pattern):
            tensors[f"{tower}.layers.{i}.norm.weight"] = (WIDTH,)
            for name, shape in {"M": MAMBA, "*": ATTENTION, "E": MOE}[kind].items():
                tensors[f"{tower}.layers.{i}.mixer.{name}"] = shape
    return tensors | {f"scale_shift_tables.{i}": (3, WIDTH) for i in range(52)}


def test_the_30b_configuration_has_the_released_names_and_shapes() -> None:
    """Guards against a model that loads small recordings but not the release itself."""
    with torch.device("meta"):
        model = TwoTower(config_from_dict(PRESETS["nano-30b"]))
    slots = names.released_slots({n: tuple(t.shape) for n, t in model.state_dict().items()})
    assert {name: slot.shape for name, slot in slots.items()} == expected_30b()


def test_an_experts_tensor_goes_to_its_own_slice() -> None:
    """Guards against experts in text order, 0 1 10 11 2: every tensor fits, the model is wrong."""
    prefix = "context_tower.layers.1.mixer.experts"
    slots = names.released_slots({f"{prefix}.up_proj": (12, 5, 4)})
    assert slots[f"{prefix}.10.up_proj.weight"] == (f"{prefix}.up_proj", 10, (5, 4))
    assert len(slots) == 12


def test_layouts_are_told_apart_by_their_names() -> None:
    head = "lm_head.weight"
    for name, layout in (
        ("context_tower.norm_f.weight", "two-tower"),
        ("backbone.norm_f.weight", "backbone"),
        ("model.norm_f.weight", "transformers"),
        ("transformer.h.0.weight", None),
    ):
        assert names.layout_of([head, name], NEMOTRON_H) == layout


def test_backbone_names_go_there_and_back() -> None:
    for name, there in (
        ("context_tower.layers.0.mixer.D", "backbone.layers.0.mixer.D"),
        ("context_lm_head.weight", "lm_head.weight"),
    ):
        assert NEMOTRON_H.from_tower_name(names.inner_name(name)) == there
        assert names.released_name(there, "backbone", NEMOTRON_H) == name
    assert names.released_name("model.norm_f.weight", "transformers", NEMOTRON_H) == (
        "context_tower.norm_f.weight"
    )
    assert names.released_name("mtp.layers.0.norm.weight", "backbone", NEMOTRON_H) is None


def test_only_router_tensors_are_routers() -> None:
    prefix = "context_tower.layers.1.mixer"
    assert names.is_router(f"{prefix}.gate.weight")
    assert names.is_router(f"{prefix}.gate.e_score_correction_bias")
    assert not names.is_router(f"{prefix}.norm.weight")
    assert not names.is_router(f"{prefix}.experts.0.up_proj.weight")
