"""From a backbone and questions to a denoiser, stage by stage; each can be run alone and resumed.

Every stage yields what it has done so far, so that a caller can show it. What the budget says holds
for all runs of one work folder together: time that a killed run had is not given again.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from twotower.adapt.answers import Answer, Question, read_answers, unanswered, write_answers
from twotower.adapt.budget import Budget, Clock, Progress
from twotower.adapt.features import (
    PART,
    Columns,
    Features,
    Place,
    attended,
    columns_of,
    find_places,
    is_whole,
    write_part,
)
from twotower.adapt.files import reading, write_whole
from twotower.adapt.ngrams import count_ngrams, joined
from twotower.adapt.options import (
    AnswerOptions,
    StepOptions,
    ThinOptions,
    WorkFolder,
)
from twotower.adapt.report import Pair
from twotower.adapt.training import Acceptance, Trainer, has_bfloat16_products, measure
from twotower.checkpoint.denoiser import (
    denoiser_config,
    find_denoiser,
    load_denoiser,
    save_denoiser,
    with_new_denoiser,
)
from twotower.config import TwoTowerConfig
from twotower.model import TwoTower
from twotower.model.ngrams import Ngrams
from twotower.model.precision import require_plain
from twotower.model.thin import set_block_size, spread, thin_blocks, thin_config

MIN_ANSWERS = 20
_LAYERS = 3  # of a denoiser when nobody says
HELD_OUT = 20  # one answer in so many is never trained on
_MAX_HELD = 24  # answers that the curve is measured on
_SPENT_S, _SAVE_S = 5.0, 60.0
_CURVE_POINTS, _MEASURING = 12, 0.03  # at most, and the share of the time that each may take


def reads_of(config: TwoTowerConfig, thin: ThinOptions) -> list[int]:
    """The context layers that the denoiser reads, of some of `thin_blocks`; the model need not be
    loaded. ValueError (one line) for a shape that it does not allow.
    """
    if thin.denoiser is not None:
        return [*denoiser_config(config, find_denoiser(config, thin.denoiser)).reads]
    blocks = thin_blocks(config.context)
    if not blocks:
        raise ValueError("model: has no attention layers, which alone a denoiser can read")
    count = thin.layers or min(_LAYERS, len(blocks))
    if count > len(blocks):
        raise ValueError(
            f"layers={count} must be at most {len(blocks)}, the model's attention layers"
        )
    return spread(blocks, count)


def collect_answers(
    model: TwoTower,
    questions: Sequence[Question],
    work: WorkFolder,
    thin: ThinOptions,
    options: AnswerOptions,
    budget: Budget,
) -> Iterator[Progress]:
    """Stage answers: the backbone answers questions, and what a denoiser reads of them is kept."""
    work.features.mkdir(parents=True, exist_ok=True)
    reads = reads_of(model.config, thin)
    clock, answers = Clock("answers", budget, read_spent(work)), read_answers(work.answers)
    _write_features(model, answers, work, reads)  # what a killed run left undone
    open_ones = unanswered(questions, answers)
    tokens, total, began, saved = 0, len(answers) + len(open_ones), clock.used, clock.used
    known, keyed = dict[int, Columns](), attended(model.config.context, reads)
    for answer, context in write_answers(model, open_ones, work.answers, options, clock.left):
        if context is not None:
            known[len(answers)] = columns_of(context, keyed)
        answers.append(answer)
        tokens += len(answer.tokens)
        if len(answers) % PART == 0:
            _write_features(model, answers, work, reads, known)
            known.clear()
        if clock.used - saved > _SPENT_S:
            saved = clock.used
            _write_spent(work, saved)
        rate = tokens / (clock.used - began)
        yield clock.progress(f"{len(answers)} of {total} answers, {rate:.0f} tokens/s")
    _write_features(model, answers, work, reads, known, is_last=True)
    _write_spent(work, clock.used)
    usable = sum(_is_usable(place) for place in find_places(work.features))
    if usable < MIN_ANSWERS:
        raise ValueError(
            f"minutes={budget.minutes:g}: the model has written {usable} usable answers, and "
            f"{MIN_ANSWERS} are needed; give more minutes or prompts, or fewer --max-new-tokens or "
            "a smaller --batch-size (what is done is kept)"
        )


def train(
    model: TwoTower,
    work: WorkFolder,
    thin: ThinOptions,
    options: StepOptions,
    budget: Budget,
    out: Path,
    backbone: str,
) -> Iterator[Progress]:
    """Stage train: a denoiser from the features, its curve, and in the end its folder."""
    keyed = attended(model.config.context, reads_of(model.config, thin))
    places = _usable(work, find_places(work.features, keyed))
    made, features = first_denoiser(model, thin, options.seed, work), Features(keyed)
    trainer = Trainer(made, features, options, thin.denoiser)
    if work.checkpoint.is_file():
        trainer.load(work.checkpoint)
    # What a killed run did after its last checkpoint is lost, and its time given again.
    clock = Clock(
        "train", budget, trainer.seconds, more=budget.seconds("answers") - read_spent(work)
    )
    trained, held = split(places)

    def measured_now() -> str:
        found = measure(made, features, held, _MEASURING * clock.total)
        del held[found.answers :]  # all points are of the same answers
        made.tokens_per_cycle = found.tokens_per_cycle
        return _add_to_curve(work, trainer, found, options)

    average, words, saved, measured, measuring_s = None, "", clock.used, clock.used, 0.0
    while clock.left > (measuring_s or _MEASURING * clock.total):  # which it will take once more
        loss = trainer.take_step(trained, clock.used / clock.total)
        trainer.seconds = clock.used
        average = loss if average is None else 0.98 * average + 0.02 * loss
        if trainer.seconds - measured > max(clock.total / _CURVE_POINTS, 9 * measuring_s):
            words = measured_now()
            measured, measuring_s = clock.used, clock.used - trainer.seconds
        if trainer.seconds - saved > _SAVE_S:
            trainer.save(work.checkpoint)
            saved = clock.used
        yield clock.progress(f"{trainer.step * options.blocks} blocks, loss {average:.2f}{words}")
    if trainer.step == 0:
        raise ValueError(
            f"minutes={budget.minutes:g}: no time is left to train; give more (what is done is "
            "kept)"
        )
    trainer.save(work.checkpoint)
    words = measured_now()
    made.ngrams = joined(ngrams_of(work), made.ngrams)
    save_denoiser(made, out, backbone)
    yield clock.progress(f"{trainer.step * options.blocks} blocks{words}")


def _usable(work: WorkFolder, places: Sequence[Place]) -> list[Place]:
    """Those that can be trained on. ValueError (one line) for too few, or without their answers."""
    found = [place for place in places if _is_usable(place)]
    if len(found) < MIN_ANSWERS:
        raise ValueError(
            f"{work.features}: holds {len(found)} answers; run the stage answers first"
        )
    if (num_answers := len(read_answers(work.answers))) < len(places):
        raise ValueError(
            f"{work.answers}: holds {num_answers} answers, and {work.features} {len(places)}; "
            "restore the file, or give another --work and run the stage answers first"
        )
    return found


def split(places: Sequence[Place]) -> tuple[list[Place], list[Place]]:
    """Answers to train on, and those held out."""
    trained = [place for number, place in enumerate(places) if number % HELD_OUT]
    return trained, list(places[::HELD_OUT])[:_MAX_HELD]


def first_denoiser(
    model: TwoTower, thin: ThinOptions, seed: int, work: WorkFolder | None = None
) -> TwoTower:
    """The model with the denoiser that training begins with. work: whose answers tell the draft
    vocabulary; None before there are any. ValueError (one line) for a quantised model, with whose
    weights it begins, and for a denoiser of another model.
    """
    require_plain(model, "adapt")
    if thin.denoiser is not None:
        made = load_denoiser(model, thin.denoiser)
        set_block_size(made, thin.block_size or made.config.block_size)
        return _with_tables(made)
    size, vocab_size, ids = thin.draft_vocab, model.config.vocab_size, None
    if 0 < size < vocab_size:
        ids = torch.arange(size) if work is None else draft_vocabulary(work, size, vocab_size)
    reads = reads_of(model.config, thin)
    config = thin_config(model.config, reads, thin.own_block_size, thin.draft_of(ids))
    return _with_tables(with_new_denoiser(model, config, ids, seed))


def _with_tables(made: TwoTower) -> TwoTower:
    """The model with embeddings in memory, and the head if that is what its denoiser drafts by: in
    float32 where nothing else is multiplied.
    """
    denoiser, tower, head = made.denoiser(), made.context_tower, made.context_lm_head
    if tower.embeddings.weight.is_meta:
        table = made.values_of("context_tower.embeddings")["weight"].float()
        denoiser.embeddings = nn.Embedding.from_pretrained(table)
    is_usable = head.weight.dtype == tower.norm_f.weight.dtype
    is_usable = is_usable or has_bfloat16_products(made.denoiser_device.type)
    if made.lm_head is head and (head.weight.is_meta or not is_usable):
        is_tied = head.weight is tower.embeddings.weight
        whole = (
            denoiser.embeddings.weight if is_tied else made.values_of("context_lm_head")["weight"]
        )
        made.lm_head = nn.Linear(whole.shape[1], whole.shape[0], bias=False, device="meta")
        made.lm_head.weight = nn.Parameter(whole.float(), requires_grad=False)
    return made


def measured(
    pairs: Iterable[Pair], budget: Budget, count: int, done: list[Pair]
) -> Iterator[Progress]:
    """Stage measure: pairs of `count` prompts, into a list, until the time is over."""
    clock = Clock("measure", budget)
    for pair in pairs:
        done.append(pair)
        yield clock.progress(f"{len(done)} of {count} prompts")
        if clock.left < 0:
            return


def ngrams_of(work: WorkFolder) -> Ngrams:
    """n-grams of the answers that are trained on."""
    answers = read_answers(work.answers)
    counted = [answer for number, answer in enumerate(answers) if number % HELD_OUT]
    return count_ngrams(counted, answers[::HELD_OUT])


def draft_vocabulary(work: WorkFolder, size: int, vocab_size: int) -> Tensor:
    """The ids of most answers' tokens and prompts', ascending; those of the first training stay."""
    file = work.path / f"draft_vocabulary-{size}.json"
    if not file.is_file():
        counts = Counter[int]()
        for answer in read_answers(work.answers):
            counts.update(answer.prompt)
            for token in answer.tokens:
                counts[token] += 20  # what was written is likelier than what was asked
        most = [token for token, _ in counts.most_common(size)]
        rest = (token for token in range(vocab_size) if token not in counts)
        most += [token for _, token in zip(range(size - len(most)), rest, strict=False)]
        write_whole(file, json.dumps(sorted(most)))
    with reading(file, "remove it, or give another --work"):
        return torch.tensor([int(token) for token in json.loads(file.read_text())])


def _write_features(
    model: TwoTower,
    answers: Sequence[Answer],
    work: WorkFolder,
    reads: Sequence[int],
    known: Mapping[int, Columns] = MappingProxyType({}),
    is_last: bool = False,
) -> None:
    """The parts that are missing; a last one of fewer answers only if no more will come. known: of
    answers by their number, which need not be read again.
    """
    keyed = attended(model.config.context, reads)
    for number, first in enumerate(range(0, len(answers), PART)):
        part = answers[first : first + PART]
        file = work.features / f"part-{number:05d}.safetensors"
        if len(part) < PART and not is_last:
            return
        if not is_whole(file, len(part), keyed):
            own = {index - first: known[index] for index in known if index >= first}
            write_part(model, part, reads, file, own)


def _is_usable(place: Place) -> bool:
    """Whether an answer is long enough for a block."""
    return place.last - place.start >= 2


def _add_to_curve(
    work: WorkFolder, trainer: Trainer, found: Acceptance, options: StepOptions
) -> str:
    """Write down what was measured, in the place of what a killed run had measured at this step or
    later; returns it in words.
    """
    point = {
        "seconds": round(trainer.seconds, 1),
        "steps": trainer.step,
        "blocks": trainer.step * options.blocks,
        "tokens_per_cycle": round(found.tokens_per_cycle, 4),
        "right": [round(share, 4) for share in found.right],
        "answers": found.answers,
    }
    lines = work.curve.read_text().splitlines() if work.curve.is_file() else []
    lines = [line for line in lines if _steps_of(line) < trainer.step]
    write_whole(work.curve, "\n".join([*lines, json.dumps(point), ""]))
    return f", {found.tokens_per_cycle:.2f} tokens a cycle on held-out answers"


def _steps_of(point: str) -> float:
    """Of a line of the curve; infinite for half a line."""
    try:
        return int(json.loads(point)["steps"])
    except (KeyError, TypeError, ValueError):
        return math.inf


def read_spent(work: WorkFolder) -> float:
    """Seconds that the stage answers has had in all runs."""
    if not work.spent.is_file():
        return 0.0
    with reading(work.spent, "remove it, or give another --work"):
        return float(json.loads(work.spent.read_text()).get("answers", 0.0))


def _write_spent(work: WorkFolder, seconds: float) -> None:
    write_whole(work.spent, json.dumps({"answers": round(seconds, 1)}))
