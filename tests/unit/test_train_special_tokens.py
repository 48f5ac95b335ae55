"""Special tokens of a foreign tokenizer, from its files to the exported model."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from tiny_denoiser import denoiser, exported, run
from tiny_training import tiny_options, write_documents
from twotower.checkpoint import load_checkpoint, save_backbone
from twotower.families import config_from_dict, config_to_dict, read_config
from twotower.tokenizer import load_tokenizer
from twotower.train.data import Rows
from twotower.train.models import starting_model
from twotower.train.prepare import PrepareOptions, prepare
from twotower.train.shard import Shard, SpecialTokens

END = "<|endoftext|>"


def make_foreign(folder: Path, *more: str, named: bool = True, **files: dict[str, object]) -> Path:
    """A byte tokenizer as GPT-2's: one special token with id 0, `!` 1, `"` 2, `#` 3; `more` special
    ones at the end.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate([END, *letters, *more])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END, *more])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": END, "eos_token": {"content": END}} if named else {}
    for name, content in ({"tokenizer_config": config} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def make_shard(folder: Path, tokenizer: Path, **options: object) -> Shard:
    source = write_documents(folder.with_name("documents.jsonl"))
    chosen = PrepareOptions(output=folder, input=(source,), tokenizer=tokenizer, **options)  # type: ignore[arg-type]
    for _ in prepare(chosen):
        pass
    return Shard(folder)


def special(shard: Shard) -> tuple[int | None, tuple[int, ...], int | None, int | None]:
    found = shard.meta.special
    return found.bos, found.eos, found.pad, found.mask


def test_one_token_that_begins_and_ends_texts(tmp_path: Path) -> None:
    """Silent failure: ids 1, 2 and 3, which are bos, eos and mask in our own tokenizers, are `!`,
    `"` and `#` here: texts end at a quotation mark and `#` is taken for the mask.
    """
    shard = make_shard(tmp_path / "shard", make_foreign(tmp_path / "foreign"))
    assert special(shard) == (0, (0,), None, None)
    assert (shard.meta.vocab_size, shard.meta.mask_id, shard.meta.model_vocab_size) == (
        257, 257, 258,
    )  # fmt: skip
    first = run(tiny_options(shard.folder, tmp_path / "backbone"))
    assert first[0].loss == pytest.approx(torch.log(torch.tensor(258.0)).item(), abs=0.3)
    options = denoiser(shard.folder, tmp_path / "backbone" / "export", tmp_path / "denoiser")
    run(options)
    for folder in (tmp_path / "backbone" / "export", tmp_path / "denoiser" / "export"):
        config = read_config(folder)
        ids = (config.bos_token_id, config.eos_token_ids, config.pad_token_id, config.mask_token_id)
        assert ids == (0, (0,), None, 257)
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (0, 0, None)
    assert exported(options).denoiser_tower is not None


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_documents_are_what_generation_sees(tmp_path: Path, align: int, adds_bos: bool) -> None:
    """Silent failure: documents begin with a bos that prompts have not, or rows begin at the end of
    the document before, because its token is the bos too.
    """
    config = {"bos_token": END, "eos_token": END, "add_bos_token": adds_bos}
    foreign = make_foreign(tmp_path / "foreign", tokenizer_config=config)
    shard = make_shard(tmp_path / "shard", foreign, align=align)
    tokenizer = load_tokenizer(shard.folder)
    prompt = tokenizer.encode_prompt("Say ")
    assert (prompt[0] == 0) == adds_bos
    rows = Rows(shard, 32, seed=1).training(0, 60)
    for tokens in rows.tokens.tolist():
        begins = [at for at in range(28) if tokens[at : at + len(prompt)] == prompt]
        assert begins[0] < align
        assert set(tokens[: begins[0]]) <= {0}
    begins = shard.beginnings(slice(None))
    assert len(begins) == shard.meta.num_documents == 400
    assert all(shard.tokens[at : at + len(prompt)].tolist() == prompt for at in begins)


@pytest.mark.parametrize(
    ("more", "files", "expected"),
    [
        ((), {"generation_config": {"eos_token_id": [0, 5]}}, (0, (0, 5), None, None)),
        (("<m>",), {"tokenizer_config": {"bos_token": END, "eos_token": END, "mask_token": "<m>"}},
         (0, (0,), None, 257)),
        (("<s>", "<p>"), {"tokenizer_config": {"bos_token": "<s>"}, "generation_config":
         {"eos_token_id": 0, "pad_token_id": 258}}, (257, (0,), 258, None)),
        ((), {"generation_config": {"eos_token_id": [0, 300]}}, (0, (0,), None, None)),
    ],
    ids=["several eos", "a mask", "by id", "an id of padding"],
)  # fmt: skip
def test_ids_come_from_the_tokenizers_files(
    tmp_path: Path, more: tuple[str, ...], files: dict[str, dict[str, object]], expected: object
) -> None:
    shard = make_shard(tmp_path / "shard", make_foreign(tmp_path / "foreign", *more, **files))
    assert special(shard) == expected
    written = json.loads((tmp_path / "shard" / "meta.json").read_text())["special"]
    assert SpecialTokens(**written | {"eos": tuple(written["eos"])}) == shard.meta.special


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {},
            "eos_token: .* names none; say which token ends a text with eos_token=..., e.g. ",
        ),
        ({"eos_token": "</s>"}, "eos_token: '</s>' is not a token of"),
        ({"bos_token": "<s>", "eos_token": END}, "bos_token: '<s>' is not a token of"),
        ({"eos_token": END, "mask_token": "#"}, "'#' .* is an ordinary token"),
        ({"eos_token": END, "mask_token": END}, "begins or ends documents"),
    ],
)
def test_a_missing_token_is_asked_for(
    tmp_path: Path, options: dict[str, object], words: str
) -> None:
    foreign = make_foreign(tmp_path / "foreign", named=False)
    with pytest.raises(ValueError, match=words) as caught:
        make_shard(tmp_path / "shard", foreign, **options)
    assert "\n" not in str(caught.value)


def test_named_tokens_reach_the_exported_tokenizer(tmp_path: Path) -> None:
    foreign = make_foreign(tmp_path / "foreign", "<s>", "<m>", named=False)
    named = {"bos_token": "<s>", "eos_token": END, "mask_token": "<m>"}
    shard = make_shard(tmp_path / "shard", foreign, **named)
    assert special(shard) == (257, (0,), None, 258)
    run(tiny_options(shard.folder, tmp_path / "run", steps=1))
    tokenizer = load_tokenizer(tmp_path / "run" / "export")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (257, 0, 258)
    assert tokenizer.encode_prompt("") == [257] and shard.tokens[:][0] == 257


def test_a_tokenizer_without_bos_needs_none(tmp_path: Path) -> None:
    """Silent failure: a refusal of most tokenizers, or token 0 before every prompt."""
    foreign = make_foreign(tmp_path / "foreign", tokenizer_config={"eos_token": END})
    shard = make_shard(tmp_path / "shard", foreign)
    assert special(shard) == (None, (0,), None, None)
    run(tiny_options(shard.folder, tmp_path / "run", steps=1))
    config = read_config(tmp_path / "run" / "export")
    assert (config.bos_token_id, config.eos_token_ids) == (None, (0,))


def foreign_backbone(folder: Path, shard: Shard, vocab_size: int) -> Path:
    """A backbone as `transformers` writes it: no mask in its config.json, ids of its own."""
    options = tiny_options(shard.folder, folder)
    model = starting_model(options, shard)
    config = config_to_dict(model.config) | {"vocab_size": vocab_size, "mask_token_id": 3}
    larger = type(model)(config_from_dict(config), "context")
    larger.load_state_dict(
        {n: v if v.shape == larger.state_dict()[n].shape else larger.state_dict()[n]
         for n, v in model.state_dict().items()}
    )  # fmt: skip
    save_backbone(larger, folder, extra_files=load_tokenizer(shard.folder).files())
    values = json.loads((folder / "config.json").read_text())
    del values["mask_token_id"]
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("vocab_size", [257, 258, 320])
def test_a_backbone_gets_a_mask_past_its_vocabulary(tmp_path: Path, vocab_size: int) -> None:
    """Silent failure: the denoiser of a foreign backbone takes `#` for the mask. And a refusal: the
    model pads its vocabulary beyond its own tokenizer.
    """
    shard = make_shard(tmp_path / "shard", make_foreign(tmp_path / "foreign"))
    init = foreign_backbone(tmp_path / "backbone", shard, vocab_size)
    options = denoiser(shard.folder, init, tmp_path / "run", steps=2)
    run(options)
    model, before = exported(options), load_checkpoint(init, towers="context")
    assert (model.config.vocab_size, model.config.mask_token_id) == (vocab_size, vocab_size)
    ids = torch.tensor([[0, 40, 41, 42]])
    logits = model.context_logits(ids)
    assert torch.equal(logits, before.context_logits(ids))
    again = denoiser(shard.folder, tmp_path / "run" / "export", tmp_path / "again", steps=1)
    run(again)
    assert exported(again).config == model.config


def test_a_backbone_without_a_mask_takes_that_of_the_data(tmp_path: Path) -> None:
    """Guards a backbone of another maker and data that name a mask: its denoiser had an embedding
    of its own for one, and the run ended as a defect."""
    shard = make_shard(
        tmp_path / "shard", make_foreign(tmp_path / "foreign", "<m>"), mask_token="<m>"
    )
    init = foreign_backbone(tmp_path / "backbone", shard, 320)
    options = denoiser(shard.folder, init, tmp_path / "run", steps=1)
    run(options)
    config = exported(options).config
    assert (config.vocab_size, config.mask_token_id) == (320, shard.meta.mask_id)
    assert config.mask_token_id < 320


def test_another_tokenizer_than_the_models_is_refused(tmp_path: Path) -> None:
    """Silent failure: a larger vocabulary hides that all ids mean something else."""
    shard = make_shard(tmp_path / "shard", make_foreign(tmp_path / "foreign", "<m>"))
    other = make_shard(tmp_path / "other", make_foreign(tmp_path / "short"))
    init = foreign_backbone(tmp_path / "backbone", shard, 320)
    with pytest.raises(ValueError, match=r"data: .*other has another tokenizer than .*backbone"):
        run(denoiser(other.folder, init, tmp_path / "run"))


def test_a_trained_denoiser_keeps_its_mask(tmp_path: Path) -> None:
    """Silent failure: a denoiser that has learnt one mask token is fed another."""
    foreign = make_foreign(tmp_path / "foreign", "<m>", "<n>")
    shard = make_shard(tmp_path / "shard", foreign, mask_token="<m>")
    run(tiny_options(shard.folder, tmp_path / "backbone", steps=1))
    run(denoiser(shard.folder, tmp_path / "backbone" / "export", tmp_path / "run", steps=1))
    other = make_shard(tmp_path / "other", foreign, mask_token="<n>")
    with pytest.raises(ValueError, match="mask_token: 258 in the data, 257 in the denoiser"):
        run(denoiser(other.folder, tmp_path / "run" / "export", tmp_path / "no"))
    unnamed = make_shard(tmp_path / "unnamed", foreign)
    options = denoiser(unnamed.folder, tmp_path / "run" / "export", tmp_path / "yes", steps=1)
    run(options)
    assert exported(options).config.mask_token_id == 257


def test_a_vocabulary_with_holes_is_as_long_as_its_last_id(tmp_path: Path) -> None:
    """Silent failure: the highest ids are outside the model, which is sized by their number."""
    foreign = make_foreign(tmp_path / "foreign")
    content = json.loads((foreign / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = 400
    (foreign / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(foreign)
    assert tokenizer.vocab_size == 401
    assert tokenizer.decode(tokenizer.encode("banana")) == "banana"
    shard = make_shard(tmp_path / "shard", foreign)
    assert shard.meta.model_vocab_size == 402
    run(tiny_options(shard.folder, tmp_path / "run", steps=1))


DEEP = "[" * 200_000
BAD_FILES = {
    "tokenizer.json": ["", "[]", "{}", '{"model": null}', DEEP],
    "tokenizer_config.json": ["[]", "?", DEEP],
    "generation_config.json": ["[]", '{"eos_token_id": "x"}', '{"eos_token_id": true}', DEEP],
}


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, ts in BAD_FILES.items() for t in ts])
def test_bad_files_of_a_tokenizer_are_one_line(tmp_path: Path, name: str, text: str) -> None:
    foreign = make_foreign(tmp_path / "foreign")
    (foreign / name).write_text(text)
    with pytest.raises(ValueError, match=name) as caught:
        make_shard(tmp_path / "shard", foreign)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
