# SPDX-License-Identifier: Apache-2.0
"""Parameter gathers and gradient reductions that run beside forward and backward, on 8 ranks.

Buckets are small, so that every module has several. Weights after some steps must be those of a
run without such gathers, bit for bit: nothing else tells a gather that was forgotten, since stale
weights train on, somewhat worse. That the gradients are right is for the parity table to say.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.mimo.digits.data import Batch, DigitsBatches
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.models.mimo.gradients.finalize import iter_modules, wrap_modules_with_ddp
from megatron.core.models.mimo.model.encoder_runner import tied_to_parameters
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from mimo_colocated.launch.layouts import Layout
from tests.models import model as digits_model
from tests.models.model import LANGUAGE, VISION, Experts, ModelOptions, build_model
from tests.models.trainer import Trainer, TrainOptions
from tests.parity.tasks import MixedBatches
from tests.unit_tests.mimo.digits_runs import BATCH, DATA_SEED, SIZE, Run, ended, same
from tests.unit_tests.mimo.tiny_modules import COLOCATED, WIDTH, config, on_all_ranks, tiny_model

# A rank that waits for a gather which another one does not enter runs into it.
pytestmark = pytest.mark.ranks(8, timeout=120)

BUCKET = 4000  # elements


class Steps:
    """Other images in every step: ``"all"`` samples have some, ``"mixed"``: a third, ``"none"``."""

    global_batch_size = BATCH

    def __init__(self, *kinds: str) -> None:
        self._steps = [
            DigitsBatches(DATA_SEED, "train", BATCH)
            if kind == "all"
            else MixedBatches(BATCH, kind, uneven_loss_mask=False)
            for kind in kinds
        ]

    def __len__(self) -> int:
        return len(self._steps)

    def local_batch(self, step: int, *args: Any) -> Batch:
        return self._steps[step].local_batch(step, *args)

    def tokens(self, token: int, step: int, *args: int) -> Any:
        return self._steps[step].tokens(token, step, *args)


@contextlib.contextmanager
def run(
    vision: str,
    language: str,
    *,
    gather: bool,
    bucket: int | None = BUCKET,
    micro_batches: int = 1,
    encode_ahead: int | None = None,
    **options: Any,
) -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        small = functools.partial(DistributedDataParallelConfig, bucket_size=bucket)
        patch.setattr(digits_model, "DistributedDataParallelConfig", small)
        built = build_model(
            Layout.parse(vision, "vision"),
            Layout.parse(language, "language"),
            ModelOptions(**{"size": SIZE, **options}, seed=5, overlap_param_gather=gather),
        )
    train = TrainOptions(
        steps=10,
        global_batch_size=BATCH,
        micro_batches=micro_batches,
        encode_ahead=encode_ahead,
        warmup_steps=1,
    )
    with ended(built):
        yield Run(built, Trainer(built, train, True))


MIXED = ("none", "all", "mixed", "none", "mixed", "none")
# Steps that differ in who runs an encoder: all ranks, some, none.
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "routed": (MIXED, {"vision": "tp=1,dp=8", "language": "tp=2,cp=2,dp=2"}),
    "ahead": (MIXED, {
        "vision": "tp=2,dp=4", "language": "tp=2,cp=2,dp=2", "micro_batches": 4,
        "encode_ahead": 2, "freeze": "lower-encoder", "tied": True}),
    # The gather bridge wants as many rows of all siblings.
    "gather": (("none", "all", "none", "all", "none"), {
        "vision": "tp=4,dp=2", "language": "tp=1,cp=2,dp=4", "bridge": "gather"}),
    "stages": (MIXED, {
        "vision": "tp=2,dp=4", "language": "tp=1,cp=2,pp=2,dp=2", "micro_batches": 4,
        "encode_ahead": 1, "freeze": "lower-encoder", "tied": True,
        "size": replace(SIZE, language_layers=2)}),
    "virtual": (MIXED, {
        "vision": "tp=2,dp=4", "language": "tp=1,cp=2,pp=2,dp=2,ep=4", "micro_batches": 2,
        "virtual_stages": 2, "experts": Experts(4),
        "size": replace(SIZE, language_layers=4)}),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_weights_are_those_of_a_run_that_gathers_at_once(case: str) -> None:
    kinds, options = CASES[case]
    batches, found = Steps(*kinds), []
    for gather in (False, True):
        with run(**options, gather=gather) as one:
            if gather:
                assert len(list(one.built.model._gathering())) > 4
            results = [one.trainer.step(batches, step) for step in range(len(batches))]
            assert all(result.success for result in results)
            handles = [group.param_gather_handle for group in one.built.model._gathering()]
            found.append((one.weights(), [(result.loss, result.grad_norm) for result in results]))
            # Evaluation in between gathers, too, and does so once.
            read = one.trainer.read(DigitsBatches(DATA_SEED, "held_out", BATCH), 0)
            found[-1] += (read,)
    assert not any(handles)
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][2], found[1][2])
    assert same(found[0][0], found[1][0])


def test_microbatches_ahead_train_alike_with_dropout() -> None:
    """Each module draws from a stream of its own, so masks are those of one after the other."""
    batches, found = Steps("mixed", "none", "all"), []
    for ahead, rate in ((None, 0.25), (2, 0.25), (2, 0.0)):
        layouts = {"vision": "tp=2,dp=4", "language": "tp=2,cp=2,dp=2"}
        options = {"micro_batches": 4, "encode_ahead": ahead, "dropout": rate}
        with run(**layouts, gather=True, **options) as one:
            results = [one.trainer.step(batches, step) for step in range(len(batches))]
            found.append((one.weights(), [(result.loss, result.grad_norm) for result in results]))
    assert found[0][1] == found[1][1]
    assert same(found[0][0], found[1][0])
    assert found[1][1] != found[2][1]


def test_a_checkpoint_has_the_weights_of_the_last_step(shared_tmp_path: Path) -> None:
    """Until the next forward pass they are in parts, each on the rank that updated it.

    The language model has several buckets with padding behind them.
    """
    batches = Steps("all", "mixed", "mixed", "none")
    layouts = {"vision": "tp=1,dp=8", "language": "tp=2,cp=2,dp=2"}
    with run(**layouts, gather=True) as one:
        buckets = one.built.model.language_model.buffers[0].buckets
        assert any(bucket.numel_unpadded < bucket.grad_data.numel() for bucket in buckets[:-1])
        one.trainer.step(batches, 0)
        one.trainer.step(batches, 1)
        one.save(one.store(shared_tmp_path), 2)
        weights = one.weights()
        last = [one.trainer.step(batches, step) for step in (2, 3)]
    for gather in (False, True):
        with run(**layouts, gather=gather) as other:
            other.load(other.store(shared_tmp_path), 2)
            assert same(other.weights(), weights)
            assert [other.trainer.step(batches, step) for step in (2, 3)] == last


def test_steps_may_have_other_numbers_of_microbatches() -> None:
    """Over a gather bridge encoders run backward once for each."""
    size = replace(SIZE, language_layers=2)
    layouts = {"vision": "tp=2,dp=4", "language": "tp=1,cp=2,pp=2,dp=2", "size": size}
    batches, found = Steps("none", "all", "all", "none", "all", "all"), []
    for overlap in (False, True):
        with run(**layouts, gather=False, bridge="gather", overlap_grad_reduce=overlap) as one:
            results = []
            for step, micro_batches in enumerate((2, 2, 4, 2, 1, 2)):
                one.trainer.options = replace(one.trainer.options, micro_batches=micro_batches)
                result = one.trainer.step(batches, step)
                results += [result.loss, result.grad_norm]
            found.append(results)
    assert found[0] == pytest.approx(found[1], rel=1e-5)  # buckets are summed in another order


def test_weights_are_gathered_after_a_step_whatever_ran_before_it() -> None:
    """Say, an evaluation with the gradients already there."""
    batches, found = Steps("all", "mixed", "all"), []
    for gather in (False, True):
        with run("tp=1,dp=8", "tp=2,cp=2,dp=2", gather=gather) as one:
            one.trainer.step(batches, 0)
            one.trainer.model.train()
            one.trainer.gradients(batches, 1)
            one.trainer.read(DigitsBatches(DATA_SEED, "held_out", BATCH), 0)
            assert one.trainer.optimizer.step()[0]
            found.append((one.trainer.step(batches, 2), one.weights()))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


class Events:
    """What happened in which order: (what, module, index of the bucket or name of a part)."""

    def __init__(self, one: Run, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, str, Any]] = []
        names = {
            id(group): (name, index)
            for name, module in iter_modules(one.built.model)
            for index, group in enumerate(module.bucket_groups)
        }
        for what in ("start_param_sync", "finish_param_sync", "start_grad_sync"):
            method = getattr(_ParamAndGradBucketGroup, what)
            patch.setattr(_ParamAndGradBucketGroup, what, self._noting(what, method, names))
        modules = dict(iter_modules(one.built.model))
        language = unwrap_model(modules[LANGUAGE])
        parts = {
            (VISION, "encoder"): unwrap_model(modules[VISION]).encoders["digits"].patch_embedding,
            (LANGUAGE, "layer"): language.decoder.layers[0].mlp,
            (LANGUAGE, "head"): language.output_layer,
        }
        for (name, part), module in parts.items():
            # After those of DDP, which wait for the gather.
            module.register_forward_pre_hook(functools.partial(self._note, "forward", name, part))
        weight = language.embedding.word_embeddings.weight
        weight.register_hook(functools.partial(self._note, "backward", LANGUAGE, "embedding"))

    def _note(self, what: str, name: str, part: Any, *_: Any) -> None:
        self.seen.append((what, name, part))

    def _noting(self, what: str, method: Any, names: dict) -> Any:
        handle = "grad_reduce_handle" if "grad" in what else "param_gather_handle"

        def noting(group: Any, *args: Any, **kwargs: Any) -> None:
            waits = what.startswith("finish") and getattr(group, handle) is not None
            method(group, *args, **kwargs)
            if what.startswith("start"):
                assert getattr(group, handle) is not None, "not asynchronous"
            if waits or what.startswith("start"):
                self.seen.append((what, *names[id(group)]))

        return noting

    def at(self, *event: Any) -> int:
        return self.seen.index(event)

    def all_of(self, what: str, name: str) -> list[int]:
        return [part for kind, module, part in self.seen if (kind, module) == (what, name)]


def test_gathers_and_reductions_run_beside_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the order of what happens, not by the clock; the same order on ranks without images."""
    batches = Steps("all", "all", "mixed", "none")
    with run("tp=1,dp=8", "tp=2,cp=2,dp=2", gather=True) as one:
        one.trainer.step(batches, 0)
        counts = {name: len(module.bucket_groups) for name, module in iter_modules(one.built.model)}
        events = Events(one, monkeypatch)
        for step, kind in ((1, {True}), (2, {True, False}), (3, {False})):
            events.seen.clear()
            one.trainer.step(batches, step)
            waited_for = {n: sorted(events.all_of("finish_param_sync", n)) for n in counts}
            # On all ranks: one that fails alone leaves the others waiting.
            complete = {name: list(range(count)) for name, count in counts.items()}
            assert on_all_ranks(waited_for == complete) == [True] * 8
            head = 0  # the bucket of a module's last parameters
            started = events.at("start_param_sync", LANGUAGE, head)
            assert started < events.at("forward", LANGUAGE, "layer")
            waited = events.at("finish_param_sync", LANGUAGE, head)
            assert events.at("forward", LANGUAGE, "layer") < waited
            assert waited < events.at("forward", LANGUAGE, "head")
            ran = ("forward", VISION, "encoder") in events.seen
            if ran:
                assert started < events.at("forward", VISION, "encoder")
                last = events.at("finish_param_sync", VISION, head)
                assert events.at("forward", VISION, "encoder") < last
            reduced = events.at("start_grad_sync", LANGUAGE, head)
            assert reduced < events.at("backward", LANGUAGE, "embedding")
            for name, count in counts.items():
                assert count > 2
                assert events.all_of("start_param_sync", name) == complete[name][::-1]
                assert events.all_of("start_grad_sync", name) == complete[name]
            assert set(on_all_ranks(ran)) == kind


def test_hooks_may_be_taken_off_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Steps("mixed", "mixed", "none")
    with run("tp=1,dp=8", "tp=2,cp=2,dp=2", gather=True) as one:
        one.trainer.step(batches, 0)
        one.built.model.disable_forward_pre_hook()
        weights = {n: p.detach().clone() for n, p in one.built.model.named_parameters()}
        one.trainer.read(DigitsBatches(DATA_SEED, "held_out", BATCH), 0)
        assert list(one.built.model._gathering()) == []
        one.built.model.enable_forward_pre_hook()
        assert same(one.weights(), weights)
        assert one.trainer.step(batches, 1).success
        assert not same(one.weights(), weights)


def test_gathers_of_weights_that_nobody_cuts_are_refused() -> None:
    with tiny_model(COLOCATED, wrap=False) as model:
        configs = {name: config() for name in model.grids}
        ddp_config = DistributedDataParallelConfig(overlap_param_gather=True)
        with pytest.raises(ValueError, match="gathers weights .*set it to True, or leave overlap"):
            wrap_modules_with_ddp(model, configs, ddp_config, model.collections)


class Crossed(MegatronModule):
    """Two layers that run in another order than they are registered in."""

    def __init__(self) -> None:
        super().__init__(config=config())
        self.second = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.first = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(rows))


def wrapped_in_two_buckets(model: Any, module: torch.nn.Module) -> Any:
    """The module as the model's encoder, with a bucket for each of its two weights."""
    model.modality_submodules["images"] = module
    settings = DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=WIDTH**2)
    configs = {name: config() for name in COLOCATED}
    wrap_modules_with_ddp(model, configs, settings, model.collections)
    wrapped = model.modality_submodules["images"]
    assert len(wrapped.bucket_groups) == 2
    return wrapped


def test_buckets_that_ranks_fill_in_different_orders_are_reduced_in_one(rank_device):
    """Stock would sum the first layer's gradient on some ranks with the second's on others."""
    with tiny_model(COLOCATED, wrap=False) as model:
        torch.manual_seed(5)
        module = Crossed().to(rank_device)
        rows = torch.randn(3, WIDTH, device=rank_device)
        module(rows).sum().backward()
        alone = {n: p.grad.clone() for n, p in module.named_parameters()}
        module.zero_grad()
        wrapped = wrapped_in_two_buckets(model, module)
        group = model.collections["images"].dp
        for _ in range(3):  # stock reduces during backward from the second step on
            wrapped.zero_grad_buffer()
            if group.rank() == 1:
                tied_to_parameters(rows[:0], wrapped).sum().backward()
            else:
                wrapped(rows).sum().backward()
            wrapped.finish_grad_sync()
            for name, parameter in wrapped.module.named_parameters():
                wanted = (group.size() - 1) * alone[name]
                torch.testing.assert_close(parameter.main_grad, wanted)


class Straight(MegatronModule):
    """Two layers of which the second's bucket is full first, and some that come apart."""

    def __init__(self) -> None:
        super().__init__(config=config())
        self.first = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, rows: torch.Tensor, times: int = 1) -> torch.Tensor:
        rows = self.first(rows)
        recomputed = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
        return sum(recomputed(self.second, rows) for _ in range(times))


@pytest.fixture
def straight(rank_device) -> Iterator[tuple[Any, torch.Tensor]]:
    """The module, wrapped, after a first step; and rows for it."""
    with tiny_model(COLOCATED, wrap=False) as model:
        torch.manual_seed(5)
        wrapped = wrapped_in_two_buckets(model, Straight().to(rank_device))
        yield wrapped, torch.randn(3, WIDTH, device=rank_device)


def reduced(wrapped: Any, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of one step."""
    wrapped.zero_grad_buffer()
    wrapped(rows).sum().backward()
    wrapped.finish_grad_sync()
    return {n: p.main_grad.clone() for n, p in wrapped.module.named_parameters()}


def test_of_a_step_that_was_given_up_nothing_stays(straight):
    """There the bucket that is reduced first was not full, but the one behind it was."""
    wrapped, rows = straight
    wanted = reduced(wrapped, rows)
    wrapped.zero_grad_buffer()
    wrapped.module.first(rows).sum().backward()
    for _ in range(2):
        assert same(reduced(wrapped, rows), wanted)


def test_a_gradient_after_the_reduction_is_an_error(straight):
    """Else it would be missing from the sum, and nobody would be told."""
    wrapped, rows = straight
    reduced(wrapped, rows)
    wrapped.zero_grad_buffer()
    with pytest.raises(ValueError, match="parameter 'second.weight' got one more gradient after"):
        wrapped(rows, times=2).sum().backward()
    for group in wrapped.bucket_groups:
        if group.grad_reduce_handle is not None:
            group.grad_reduce_handle.wait()
