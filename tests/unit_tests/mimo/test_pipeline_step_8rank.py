# SPDX-License-Identifier: Apache-2.0
"""Steps of a pipelined language model on 8 ranks: what microbatches may be, and windows of them.

The model is the digits job's, with four language layers whose head is the word embeddings. The
oracle is the same model on one process, one stage, microbatch by microbatch through ``forward``.
Loss and every gradient are compared before the optimizer. Layouts with uniform batches are tried
in ``test_end_to_end_8rank``; a rank that waits in vain ends with the test's deadline.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from examples.mimo.digits.data import DIGITS_PER_SAMPLE, Batch, DigitsBatches
from megatron.core.models.mimo.comm.plan.token_runs import split_items
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.model.encoded import EncodedMicrobatches
from megatron.core.utils import unwrap_model
from mimo_colocated.launch.layouts import Layout
from tests.models.model import VISION, BuiltModel, ModelOptions, ModelSize, build_model
from tests.models.trainer import Trainer, TrainOptions
from tests.parity.compare import GRADIENTS, tensor_checks, worst_by_kind
from tests.parity.tasks import named
from tests.parity.tensors import local_gradients, whole_tensors
from tests.unit_tests.mimo.test_end_to_end_8rank import names_on_all_stages

pytestmark = pytest.mark.ranks(8, timeout=120)

SIZE = ModelSize(
    vision_hidden=32,
    vision_layers=1,
    language_hidden=32,
    language_layers=4,
    language_query_groups=4,
)
OPTIONS = ModelOptions(size=SIZE, tied=True, distributed_optimizer=False, overlap_grad_reduce=True)
SAMPLES = 4
# Which samples of each microbatch have images: none in the first, a middle and the last one.
MIXED = ([0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0])
TEXT_ONLY = ([0, 0, 0, 0],) * 2
# One number, so fp32 rounding is not averaged over a tensor.
LOSS_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Pipe:
    """A layout of the language model; the encoder is data-parallel over all 8 ranks."""

    name: str
    language: str
    virtual_stages: int = 1


PIPES = [
    Pipe("pp2_cp2_dp2", "tp=1,cp=2,pp=2,dp=2"),
    Pipe("pp4_cp2", "tp=1,cp=2,pp=4,dp=1"),
    Pipe("virtual_pp2_cp2_dp2", "tp=1,cp=2,pp=2,dp=2", virtual_stages=2),
]


def microbatches(images: tuple[list[int], ...]) -> list[Batch]:
    """Global microbatches in which some samples show their digits in tokens."""
    whole = DigitsBatches(7, "train", SAMPLES * len(images), uneven_loss_mask=True).batch(0)
    made = []
    for number, has_images in enumerate(images):
        start = number * SAMPLES
        batch = whole.samples(start, SAMPLES).images_of(start, SAMPLES)
        kept = torch.tensor(has_images, dtype=torch.bool, device=batch.images.device)
        pixels = batch.images[kept.repeat_interleave(DIGITS_PER_SAMPLE)]
        made.append(replace(batch, input_ids=named(batch, ~kept), images=pixels))
    return made


def local(trainer: Trainer, batch: Batch) -> dict[str, Any]:
    """One rank's inputs: the samples of its language replica, and a run of all images."""
    parts = trainer.parts()
    (encoder, encoders), (replica, replicas) = parts[VISION], parts["language"]
    size = SAMPLES // replicas
    mine = split_items(len(batch.images), encoders)[encoder]
    part = replace(
        batch.samples(replica * size, size), images=batch.images[mine.start : mine.stop]
    )
    return trainer.inputs(part.to(trainer.device))


@dataclass
class Result:
    """Sums over the global step, and whole gradients (none without a backward pass)."""

    loss: float
    tokens: int
    gradients: dict[str, torch.Tensor]


@dataclass
class Model:
    """A built model that runs given microbatches."""

    built: BuiltModel
    trainer: Trainer

    def step(
        self, images: tuple[list[int], ...], *, forward_only: bool = False, unit: float = 0
    ) -> Result:
        """One step; with ``unit`` the tokens of microbatch n weigh (n + 1) units."""
        trainer = self.trainer
        trainer.model.zero_grad_buffer()
        inputs = [local(trainer, batch) for batch in microbatches(images)]
        with contextlib.ExitStack() as stack:
            step = trainer.forward_step
            stack.callback(setattr, trainer, "forward_step", step)
            if forward_only:
                trainer.forward_step = reporting(step)
            elif unit:
                trainer.forward_step = weighted(step, unit)
            sums = trainer.schedule(iter(inputs), len(inputs), forward_only=forward_only)
        nothing = torch.zeros(2, dtype=torch.float64, device=trainer.device)
        total = torch.stack(sums).sum(dim=0).to(trainer.device) if sums else nothing
        dist.all_reduce(total, group=trainer.groups.dp_cp)
        loss, tokens = trainer.from_last_stage(total).tolist()
        gradients = {} if forward_only else local_gradients(self.built.model)
        whole = whole_tensors(self.built.model, self.built.collections, gradients)
        return Result(loss, int(tokens), whole)


def reporting(step: Callable[..., Any]) -> Callable[..., Any]:
    """A forward step whose loss is collected as data, as evaluation does."""

    def reported(data: Any, model: Any) -> Any:
        output, loss_func = step(data, model)
        return output, lambda losses, non_loss_data: loss_func(losses)[2]

    return reported


def weighted(step: Callable[..., Any], unit: float) -> Callable[..., Any]:
    """A forward step whose loss weighs microbatch n with (n + 1) units; fractions are floats."""
    numbers = itertools.count(1)

    def weigh(data: Any, model: Any) -> Any:
        output, loss_func = step(data, model)

        def weighed(losses: torch.Tensor) -> Any:
            loss, tokens, report = loss_func(losses)
            weight = unit * next(numbers)
            count = tokens * weight if unit < 1 else tokens * int(weight)
            return loss * weight, count, report

        return output, weighed

    return weigh


@contextlib.contextmanager
def model(vision: str, language: str, options: ModelOptions, **place: int) -> Iterator[Model]:
    layouts = Layout.parse(vision, "vision"), Layout.parse(language, "language")
    built = build_model(*layouts, options, **place)
    try:
        yield Model(built, Trainer(built, TrainOptions(steps=10, global_batch_size=8), False))
    finally:
        dist.barrier()
        built.destroy()


@pytest.fixture(scope="module")
def oracle() -> Iterator[Callable[[tuple[list[int], ...]], Result]]:
    """What one process finds, by the images of the microbatches."""
    known: dict[str, Result] = {}
    alone = {"rank_offset": dist.get_rank()}
    with model("tp=1,dp=1", "tp=1,dp=1", OPTIONS, **alone) as made:

        def compute(images: tuple[list[int], ...]) -> Result:
            if str(images) not in known:
                known[str(images)] = made.step(images)
            return known[str(images)]

        yield compute


@pytest.fixture(scope="module")
def oracle_of_units() -> Iterator[Result]:
    """What one process finds where microbatch n weighs n + 1, in whole numbers."""
    with model("tp=1,dp=1", "tp=1,dp=1", OPTIONS, rank_offset=dist.get_rank()) as made:
        yield made.step(MIXED, unit=1)


@pytest.fixture(scope="module", params=PIPES, ids=lambda pipe: pipe.name)
def pipe(request: pytest.FixtureRequest) -> Iterator[Model]:
    options = replace(OPTIONS, virtual_stages=request.param.virtual_stages)
    with model("tp=1,dp=8", request.param.language, options) as made:
        yield made


def check(found: Result, expected: Result) -> None:
    assert found.tokens == expected.tokens
    assert found.loss == pytest.approx(expected.loss, rel=LOSS_TOLERANCE)
    assert names_on_all_stages(found.gradients) == set(expected.gradients)
    checks = list(tensor_checks("gradients", found.gradients, expected.gradients, GRADIENTS))
    (worst,) = worst_by_kind(checks)
    assert worst.passed, f"{worst.where}: {worst.error:.2e}"


@pytest.mark.parametrize("images", [MIXED, TEXT_ONLY], ids=["mixed", "text_only"])
def test_microbatches_with_and_without_images(images, pipe, oracle):
    check(pipe.step(images), oracle(images))


def test_token_weights_with_fractions(pipe, oracle_of_units):
    """Their sum is far below 1. Gradients are those of the same weights in other units."""
    check(pipe.step(MIXED, unit=2.0**-12), oracle_of_units)


def test_the_fewest_microbatches(pipe, oracle):
    """One, or one for each stage if the schedule interleaves."""
    virtual = pipe.built.model.config.virtual_pipeline_model_parallel_size
    count = pipe.trainer.groups.pp.size() if virtual else 1
    check(pipe.step(MIXED[1 : 1 + count]), oracle(MIXED[1 : 1 + count]))


def test_evaluation_has_no_gradients(pipe, oracle):
    expected = oracle(MIXED)
    for grad_enabled in (True, False):
        with torch.set_grad_enabled(grad_enabled):
            found = pipe.step(MIXED, forward_only=True)
        assert found.tokens == expected.tokens
        assert found.loss == pytest.approx(expected.loss, rel=LOSS_TOLERANCE)
        assert not any(p.main_grad.any() for p in pipe.built.model.parameters())
    with torch.no_grad():  # a training step has none there, either
        assert pipe.step(MIXED).loss == pytest.approx(expected.loss, rel=LOSS_TOLERANCE)
    assert not any(p.main_grad.any() for p in pipe.built.model.parameters())


@pytest.mark.parametrize("ahead", [1, 2, 3, 4])
def test_windows_of_microbatches(ahead, pipe, oracle, monkeypatch):
    """Gradients as ever, and no more microbatches encoded at a time than stated."""
    stages = pipe.trainer.groups.pp.size()
    live = Counter(monkeypatch)
    pipe.trainer.options = replace(pipe.trainer.options, encode_ahead=ahead)
    try:
        if pipe.built.model.config.virtual_pipeline_model_parallel_size:
            with pytest.raises(ValueError, match="virtual ones: its first stage begins"):
                pipe.step(MIXED)
            return
        check(pipe.step(MIXED), oracle(MIXED))
        assert live.now == 0
        assert live.most <= stages - 2 + 2 * ahead
        assert live.most < len(MIXED) or ahead > 1
        pipe.step(MIXED, forward_only=True)
    finally:
        pipe.trainer.options = replace(pipe.trainer.options, encode_ahead=None)


@pytest.fixture(scope="module")
def one_stage() -> Iterator[Model]:
    with model("tp=1,dp=8", "tp=4,cp=2,dp=1", OPTIONS) as made:
        yield made


@pytest.mark.parametrize("images", [MIXED, TEXT_ONLY], ids=["mixed", "text_only"])
@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_microbatches_ahead_of_one_stage(ahead, images, one_stage, oracle, monkeypatch):
    """Bit for bit the gradients of one microbatch after the other, and the stated price."""
    plain = one_stage.step(images)
    check(plain, oracle(images))
    live = Counter(monkeypatch)
    one_stage.trainer.options = replace(one_stage.trainer.options, encode_ahead=ahead)
    try:
        found = one_stage.step(images)
        assert (found.loss, found.tokens) == (plain.loss, plain.tokens)
        for name, gradient in plain.gradients.items():
            assert torch.equal(found.gradients[name], gradient), name
        assert live.now == 0
        assert live.most == min(ahead + 2, len(images))
        evaluated = one_stage.step(images, forward_only=True)
        assert (evaluated.loss, evaluated.tokens) == (plain.loss, plain.tokens)
    finally:
        one_stage.trainer.options = replace(one_stage.trainer.options, encode_ahead=None)


class Counter:
    """Counts the microbatches whose encoders have run forward and not backward yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        encode, backward = MimoModel.encode_microbatches, EncodedMicrobatches.backward

        def counted_encode(model: Any, batches: Any, *rest: Any) -> Any:
            self.now += len(batches)
            self.most = max(self.most, self.now)
            return encode(model, batches, *rest)

        def counted_backward(encoded: Any) -> None:
            backward(encoded)
            self.now -= len(encoded.microbatches)

        monkeypatch.setattr(MimoModel, "encode_microbatches", counted_encode)
        monkeypatch.setattr(EncodedMicrobatches, "backward", counted_backward)


def test_what_does_not_fit_is_an_error_on_all_ranks(pipe):
    """And the ranks can go on afterwards."""
    trainer = pipe.trainer
    batches = [local(trainer, batch) for batch in microbatches(MIXED)]
    with pytest.raises(ValueError, match="forward runs a whole language model, this rank has some"):
        trainer.model(**batches[0])
    with pytest.raises(ValueError, match="data_iterator ended before 7 microbatches were read"):
        trainer.schedule(iter(batches), 7)
    with pytest.raises(ValueError, match="num_microbatches must be 1 or more, got 0"):
        trainer.schedule(iter(batches), 0)
    if dist.get_rank() == 3:
        short = {k: batches[1][k][..., :16] for k in ("input_ids", "labels", "position_ids")}
        batches[1] = {**batches[1], **short}
    with pytest.raises(ValueError, match=r"rank 3: microbatches .* got input_ids \(\d, 16\) after"):
        trainer.schedule(iter(batches), len(MIXED))
    trainer.model.zero_grad_buffer()


def test_what_does_not_fit_in_windows_is_an_error_on_all_ranks(pipe):
    trainer = pipe.trainer
    if pipe.built.model.config.virtual_pipeline_model_parallel_size:
        return  # encodes all of a step together
    batches = [local(trainer, batch) for batch in microbatches(MIXED)]
    if dist.get_rank() == 3:
        short = {k: batches[3][k][..., :16] for k in ("input_ids", "labels", "position_ids")}
        batches[3] = {**batches[3], **short}
    try:
        for ahead, message in ((0, "must be 1 or more microbatches, got 0"), (1, "got input_ids")):
            trainer.options = replace(trainer.options, encode_ahead=ahead)
            with pytest.raises(ValueError, match=message):
                trainer.schedule(iter(batches), 4)
    finally:
        trainer.options = replace(trainer.options, encode_ahead=None)
    trainer.model.zero_grad_buffer()


def test_lengths_that_two_interleaved_ranks_cannot_tell_are_refused(pipe, monkeypatch):
    config = pipe.built.model.config
    if not config.virtual_pipeline_model_parallel_size:
        return
    monkeypatch.setattr(config, "variable_seq_lengths", True)
    with pytest.raises(ValueError, match="pipeline of 2 ranks cannot tell lengths that differ"):
        pipe.trainer.schedule(iter(()), 4)


def test_no_microbatch_of_an_encoder_is_the_first(pipe, monkeypatch):
    """Transformer Engine's flag: its kernels overwrite gradients there, and keep fp8 weights."""
    trainer = pipe.trainer
    encoder = unwrap_model(pipe.built.model.modality_submodules[VISION]).encoders["digits"]
    part = encoder.patch_embedding
    monkeypatch.setattr(part, "is_first_microbatch", True, raising=False)
    told = []
    hook = part.register_forward_pre_hook(lambda *_: told.append(part.is_first_microbatch))
    try:
        pipe.step(MIXED)
    finally:
        hook.remove()
    assert not any(told)
    config = SimpleNamespace(fp8="e4m3", disable_parameter_transpose_cache=False)
    monkeypatch.setattr(part, "config", config, raising=False)
    with pytest.raises(ValueError, match="computes in fp8 and keeps its weights so from"):
        trainer.schedule(iter(()), 4)
    trainer.model.set_is_first_microbatch()  # of a plain step
    assert part.is_first_microbatch
    part.is_first_microbatch, config.fp8 = False, None
    trainer.model.set_is_first_microbatch()
    assert not part.is_first_microbatch


def reading(batches: list[Any], error: Exception | None) -> Iterator[Any]:
    """A loader that ends after these batches, or fails."""
    yield from batches
    if error is not None:
        raise error


@pytest.mark.parametrize("ahead", [None, 1], ids=["first_window", "later_window"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, "rank 5: data_iterator ended before 4 microbatches were read"),
        (OSError("disk gone"), "rank 5: reading data_iterator raised OSError: disk gone"),
        (KeyError("x"), "rank 5: reading data_iterator raised KeyError: 'x'"),
    ],
    ids=["ended", "disk", "key"],
)
def test_a_loader_that_fails_on_one_rank_stops_all(error, message, ahead, pipe):
    """All raise the same sentence, in the middle of a step too; nobody waits in vain."""
    trainer = pipe.trainer
    if ahead and pipe.built.model.config.virtual_pipeline_model_parallel_size:
        return  # encodes all of a step together
    batches = [local(trainer, batch) for batch in microbatches(MIXED)]
    data = reading(batches[:2], error) if dist.get_rank() == 5 else iter(batches)
    trainer.options = replace(trainer.options, encode_ahead=ahead)
    try:
        with pytest.raises(ValueError, match="^Nothing was encoded. " + message):
            trainer.schedule(data, 4)
    finally:
        trainer.options = replace(trainer.options, encode_ahead=None)
    trainer.model.zero_grad_buffer()
