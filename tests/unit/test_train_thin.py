"""A thin denoiser trained on rows: what it is shown, what counts, and what is left behind."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny_denoiser import denoiser, make_backbone, run
from tiny_training import make_shard
from twotower.backends import accelerate
from twotower.checkpoint import load_checkpoint
from twotower.checkpoint.denoiser import load_denoiser
from twotower.layers.attention import KV
from twotower.layers.mamba2 import MambaState
from twotower.model.two_tower import TwoTower
from twotower.model.view import ContextView
from twotower.native import library
from twotower.train.data import Batch, Rows
from twotower.train.drafts import DraftedBlocks, reader_of
from twotower.train.loop import train_steps
from twotower.train.models import starting_model
from twotower.train.objective import row_noise
from twotower.train.options import TrainOptions
from twotower.train.processes import ALONE
from twotower.train.run_folder import RunFolder, read_metrics
from twotower.train.shard import Shard

SIZE = 8
THIN: dict[str, object] = {"reads": (0, 1, 2), "bigram_rank": 4, "block_size": SIZE}
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shard(tmp_path_factory.mktemp("data") / "shard")


@pytest.fixture(scope="module")
def backbone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(data, tmp_path_factory.mktemp("run"))


def thin(data: Path, backbone: Path, out: Path, **changes: object) -> TrainOptions:
    return denoiser(data, backbone, out, **THIN | changes)


def needs_native() -> None:
    try:
        library.library()
    except OSError as error:
        pytest.skip(f"no native library: {error}")


def unread(rows: Tensor, block_size: int, index: Tensor) -> ContextView:
    raise AssertionError("nothing is read")


def moved(options: TrainOptions) -> TwoTower:
    """A model of random weights in all that is trained, so that each of them counts."""
    model = starting_model(options, Shard(options.data))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_trained_is_what_decoding_drafts(
    data: Path, backbone: Path, tmp_path: Path, rank: int, backend: str
) -> None:
    """Silent failure: training shows states, the hidden state or the token before of another
    place than decoding does, and acceptance stays at 1.
    """
    options = thin(data, backbone, tmp_path, bigram_rank=rank, backend=backend)
    model = moved(options)
    rows = Rows(Shard(data), 4 * SIZE, 0).training(0, 2).tokens
    index = torch.tensor([[2, 0, 2], [3, 1, 1]])
    view = reader_of(model, options, ALONE)(rows, SIZE, index)
    blocks = rows.unflatten(1, (-1, SIZE))[torch.arange(2)[:, None], index]
    found = model.draft_logits(view, blocks, index * SIZE)
    bigram, model.bigram = model.bigram, None  # which decoding gives what was drafted before
    for row, place in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        start = int(index[row, place]) * SIZE
        past, clean = rows[row : row + 1, :start], rows[row, start : start + SIZE]
        cache = model.prefill(past) if start else model.empty_cache(1)
        block = torch.full((1, SIZE), model.config.mask_token_id)
        block[0, 0] = clean[0]
        expected = model.denoise(block, cache.view(), None)[0, 1:]
        if bigram is not None:
            expected = expected + bigram(model.denoiser().embeddings(clean[:-1]))
        torch.testing.assert_close(found[row, place], expected, **CLOSE)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_native_passes_read_what_decoding_reads(
    data: Path, backbone: Path, tmp_path: Path, quantization: str
) -> None:
    """Silent failure: states are trained on that no decoding has, full-precision ones where the
    model is served with 8 bits, or of another place.
    """
    needs_native()
    options = thin(data, backbone, tmp_path, quantization=quantization, backend="native")
    model = starting_model(options, Shard(data))
    rows = Rows(Shard(data), 4 * SIZE, 0).training(0, 2).tokens
    index = torch.tensor([[3, 0], [1, 2]])
    view = reader_of(model, options, ALONE)(rows, SIZE, index)
    decoding = accelerate(load_checkpoint(backbone), "native", options.quantization)
    for row, place in ((0, 0), (1, 0), (1, 1)):
        start = int(index[row, place]) * SIZE
        expected = decoding.prefill(rows[row : row + 1, :start]).view()
        assert expected.hidden is not None and view.hidden is not None
        torch.testing.assert_close(view.hidden[row, place], expected.hidden[0, 0], **CLOSE)
        for own, other in zip(view.layers, expected.layers, strict=True):
            if isinstance(own, MambaState) and isinstance(other, MambaState):
                torch.testing.assert_close(own.ssm[row, place], other.ssm[0, 0], **CLOSE)
                torch.testing.assert_close(own.conv[row, place], other.conv[0, 0], **CLOSE)
            elif isinstance(own, KV) and isinstance(other, KV):
                for part, theirs in zip(own, other, strict=True):
                    torch.testing.assert_close(part[row, :start], theirs[0], **CLOSE)
    plain = model.read_blocks(rows, SIZE, index).hidden
    assert plain is not None
    assert (plain - view.hidden).abs().max().item() > 1e-3 or quantization == "none"


def test_only_what_can_be_accepted_counts(data: Path, backbone: Path, tmp_path: Path) -> None:
    """Silent failure: a prompt behind the end of an answer is learnt, or the first token, which
    decoding gives; or far tokens weigh as much as near ones.
    """
    options = thin(data, backbone, tmp_path, targets="completion", denoised_blocks_per_row=2)
    is_target = torch.zeros(1, 4 * SIZE, dtype=torch.bool)
    is_target[0, SIZE : SIZE + 5] = is_target[0, 2 * SIZE + 3 :] = True
    batch = Batch(tokens=torch.arange(4 * SIZE)[None], is_completion=is_target)
    drawn = DraftedBlocks(options, SIZE, unread).draw(batch, row_noise(0, 0, [0]))
    assert sorted(drawn.index[0].tolist()) == [1, 3]  # the third begins with a prompt
    near = torch.exp(-torch.arange(SIZE - 1) / options.loss_decay)
    weights = dict(zip(drawn.index[0].tolist(), drawn.weight[0], strict=True))
    torch.testing.assert_close(weights[3], near)
    torch.testing.assert_close(weights[1], near * (torch.arange(SIZE - 1) < 4))
    assert drawn.counts.item() == pytest.approx(float(drawn.weight.sum()))


def test_a_thin_run_trains_the_denoiser_alone_and_leaves_its_folder(
    data: Path, backbone: Path, tmp_path: Path
) -> None:
    """Silent failure: the backbone moves under its denoiser, or what is exported is not what was
    trained.
    """
    options = thin(data, backbone, tmp_path / "run", steps=3, learning_rate=0.01)
    before, found = load_checkpoint(backbone, towers="context"), []
    for report in train_steps(options):
        found.append(report.loss)
    made = load_denoiser(before, str(RunFolder(options.run_folder).export))
    assert made.config.reads == (0, 1, 2) and made.config.block_size == SIZE
    start = starting_model(options, Shard(data)).state_dict()
    for name, value in made.state_dict().items():
        is_trained = name.startswith(("denoiser_tower", "bigram")) and ".embeddings" not in name
        assert torch.equal(value, start[name]) != is_trained, name


def test_a_resumed_thin_run_equals_an_unbroken_one(
    data: Path, backbone: Path, tmp_path: Path
) -> None:
    """Silent failure: the bigram term or a mask's embedding begins anew at a restart."""
    common = {"steps": 5, "checkpoint_every": 2, "learning_rate": 0.01, "optimizer": "muon"}
    whole, broken = (thin(data, backbone, tmp_path / n, **common) for n in ("whole", "broken"))
    run(whole)
    steps = train_steps(broken)
    for _ in range(3):
        next(steps)
    del steps  # as a kill would: nothing is saved on the way out
    assert run(broken)[0].step == 3
    one, two = (read_metrics(RunFolder(o.run_folder).metrics) for o in (whole, broken))
    assert [line["loss"] for line in one] == [line["loss"] for line in two]
    files = [RunFolder(o.run_folder).export / "model.safetensors" for o in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_of_other_layers_is_not_continued(data: Path, backbone: Path, tmp_path: Path) -> None:
    """Silent failure: --reads of a resumed run is recorded, and the old layers go on."""
    run(thin(data, backbone, tmp_path / "run", steps=1))
    for changes in ({"reads": (0, 2)}, {"bigram_rank": 2}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}: .* differs from"):
            run(thin(data, backbone, tmp_path / "run", steps=2, **changes))


def test_the_training_of_a_thin_denoiser_goes_on(
    data: Path, backbone: Path, tmp_path: Path
) -> None:
    """Silent failure: a second run begins with new weights, or forgets their shape at a restart."""
    run(thin(data, backbone, tmp_path / "first", steps=3, learning_rate=0.01))
    export = str(RunFolder(tmp_path / "first").export)
    more = denoiser(data, backbone, tmp_path / "more", denoiser=export, checkpoint_every=2)
    before = load_denoiser(load_checkpoint(backbone, towers="context"), export)
    start = starting_model(more, Shard(data))
    assert start.config == before.config
    assert all(torch.equal(start.state_dict()[n], v) for n, v in before.state_dict().items())
    steps = train_steps(more)
    for _ in range(3):
        next(steps)
    del steps
    assert [report.step for report in run(more)] == [3, 4]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reads": (0, 3)}, r"reads=\[0, 3\] must be layers of the model, 0 to 2"),
        ({"reads": ()}, "reads"),
        ({"reads": (-1,)}, "reads=-1|reads"),
        ({"reads": (0,), "towers": "tied"}, "towers: no effect with reads"),
        ({"reads": (0,), "condition_on": "none"}, "condition_on: no effect with reads"),
        ({"reads": (0,), "early_block_size": 4}, "early_block_size: no effect with reads"),
        ({"denoiser": "there", "block_size": None}, "reads: no effect with denoiser"),
        (
            {"reads": None, "denoiser": "there", "block_size": 16, "bigram_rank": 64},
            "block_size: no effect with denoiser",
        ),
        ({"reads": None, "bigram_rank": 8}, "bigram_rank: no effect without reads"),
        ({"reads": None, "bigram_rank": 64, "loss_decay": 2.0}, "loss_decay: no effect without"),
        ({"reads": None, "bigram_rank": 64, "backend": "eager"}, "backend: no effect without"),
        ({"backend": "eager", "quantization": "int8"}, "quantization=int8: eager passes run"),
    ],
)
def test_options_of_thin_denoisers_are_checked(
    data: Path, backbone: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    """Guards bad input: one line that names the option."""
    with pytest.raises(ValueError, match=words) as caught:
        run(thin(data, backbone, tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_run_without_a_token_to_learn_is_refused(tmp_path: Path) -> None:
    """Guards against a loss of 0, which looks like a perfect denoiser: completions that begin on
    multiples of 4 leave no block of 16 that begins inside one."""
    shard = make_shard(tmp_path / "shard", align=4)
    backbone = make_backbone(shard, tmp_path / "backbone", steps=1)
    options = denoiser(shard, backbone, tmp_path / "out", reads=[0, 1], targets="completion")
    with pytest.raises(ValueError, match=r"targets=completion: no block .* use targets=all"):
        run(options)
