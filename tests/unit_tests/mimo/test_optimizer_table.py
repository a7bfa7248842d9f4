# SPDX-License-Identifier: Apache-2.0
"""Every optimizer x sharded or not x dtypes x kind of model: what is saved goes on to the bit.

A row builds, trains, saves both ways (``state_dict`` and ``CheckpointStore``) and trains on; a
fresh model of another seed that loads must have the same next losses. Rows that are not supported
must be refused when the optimizer is built.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.models.mimo.checkpoint.store import SHARDING
from megatron.core.models.mimo.training.inner_optimizers import dynamic_scalers, inner_optimizers
from megatron.core.models.mimo.training.optimizer_checks import _has_muon
from tests.unit_tests.mimo.optimizer_rows import DTYPES, Built, Row, built, rows
from tests.unit_tests.mimo.tiny_modules import on_all_ranks

BEFORE, AFTER = 2, 4
WAYS = ("state_dict", "store")
SHARDED_ROWS = [row for row in rows() if row.distributed and row.optimizer == "adam"]


def refusal(row: Row) -> str | None:
    """The sentence that refuses a row, None for those that must work."""
    if row.optimizer == "sgd" and row.distributed:
        return "'sgd' with use_distributed_optimizer=True could not be saved.*use 'adam', or 'sgd'"
    if row.optimizer == "muon" and not _has_muon():
        return "'muon' is not supported here; use 'adam', or 'sgd' with"
    if row.optimizer == "muon" and (row.distributed or row.dtype == "fp16"):
        return "'muon' works with use_distributed_optimizer=False.*fp16=False; .*or use 'adam'"
    return None


def save(one: Built, root: Path) -> tuple[Any, Any]:
    """Both ways: a checkpoint below ``root``; copies of the states of model and optimizer."""
    one.store(root).save(BEFORE, one.model, one.optimizer)
    return copy.deepcopy((one.model.state_dict(), one.optimizer.state_dict()))


def load(one: Built, way: str, root: Path, states: tuple[Any, Any], **options: Any) -> None:
    if way == "store":
        one.store(root).load(BEFORE, one.model, one.optimizer, **options)
    else:
        one.model.load_state_dict(states[0])
        one.optimizer.load_state_dict(states[1], **options)


def check_names(one: Built) -> None:
    """What is saved as the fp32 copy of a weight must be that weight's."""
    model = one.model.sharded_state_dict(metadata=dict(SHARDING))
    state = one.optimizer.sharded_state_dict(model, metadata=dict(SHARDING))
    weights = {entry.key: entry.data for entry in nested_values(model) if hasattr(entry, "key")}
    copies = 0
    for entry in nested_values(state):
        key = getattr(entry, "key", "")
        for kind in (".state.param.", ".state.fp32_param."):
            if kind in key and not isinstance(entry, ShardedTensorFactory):
                weight = weights[key.partition(kind)[2]]
                assert torch.equal(entry.data.to(weight.dtype), weight), (str(one.row), key)
                copies += 1
    assert copies or (one.row.dtype == "fp32" and not one.row.distributed)


def check(row: Row, root: Path) -> None:
    """The whole of a row."""
    if sentence := refusal(row):
        with pytest.raises(ValueError, match=sentence), built(row, 1):
            pass
        return
    with built(row, 1) as first:
        first.steps(0, BEFORE)
        states = save(first, root / str(row))
        if row.kind == "dense":  # of the others some weights are cut in pieces by factories
            check_names(first)
        expected = first.steps(BEFORE, AFTER)
    for seed, way in enumerate(WAYS, start=2):
        with built(row, seed) as second:
            load(second, way, root / str(row), states)
            assert second.steps(BEFORE, AFTER) == expected, (str(row), way)


@pytest.mark.ranks(1)
def test_what_is_saved_goes_on_to_the_bit(shared_tmp_path: Path) -> None:
    for row in rows():
        check(row, shared_tmp_path)


@pytest.mark.ranks(2)
def test_so_do_shards_of_two_ranks(shared_tmp_path: Path) -> None:
    for row in SHARDED_ROWS:
        check(row, shared_tmp_path)


@pytest.mark.ranks(1)
@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "sharded"])
def test_one_wrong_moment_is_noticed(distributed: bool, shared_tmp_path: Path) -> None:
    """Controls of the table: its losses depend on every kind of tensor that is restored."""
    row = Row("adam", distributed, "bf16", "dense")
    with built(row, 1) as first:
        first.steps(0, BEFORE)
        states = save(first, shared_tmp_path)
        expected = first.steps(BEFORE, AFTER)
    for kind in ("exp_avg", "exp_avg_sq", "main"):
        with built(row, 2) as second:
            load(second, "state_dict", shared_tmp_path, states)
            for inner in inner_optimizers(second.optimizer._active_optimizers):
                for copied, state in inner.optimizer.state.items():
                    (copied.data if kind == "main" else state[kind]).mul_(1.5)
            assert second.steps(BEFORE, AFTER) != expected, kind


@pytest.mark.ranks(1)
@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "sharded"])
def test_runs_saved_before_any_step(distributed: bool, shared_tmp_path: Path) -> None:
    """The first steps of fp16 are skipped until its loss scale fits; a run may be saved then."""
    for dtype, optimizer in itertools.product(("fp32", "fp16", "inside"), ("adam", "sgd")):
        row = Row(optimizer, distributed, dtype, "dense")
        if refusal(row):
            continue
        root = shared_tmp_path / str(row)
        with built(row, 1) as first:
            assert first.step(0, broken=True) is False
            states = save(first, root)
            scales = [float(s.scale) for s in dynamic_scalers(first.optimizer._active_optimizers)]
            expected = first.steps(BEFORE, AFTER)
        for seed, way in enumerate(WAYS, start=2):
            with built(row, seed) as second:
                load(second, way, root, states)
                found = dynamic_scalers(second.optimizer._active_optimizers)
                assert [float(s.scale) for s in found] == scales
                assert second.steps(BEFORE, AFTER) == expected, (str(row), way)


def fp32_copies(one: Built) -> dict[str, torch.Tensor]:
    """Name -> fp32 copy, flat, of what a plain or unsharded optimizer steps."""
    copies = {}
    names = {id(p): name for name, p in one.model.named_parameters()}
    for inner in inner_optimizers(one.optimizer._active_optimizers):
        if one.row.distributed:
            pairs = zip(
                inner.model_float16_groups, inner.shard_fp32_from_float16_groups, strict=True
            )
        else:
            pairs = zip(inner.float16_groups, inner.fp32_from_float16_groups, strict=True)
        for halves, mains in pairs:
            for half, main in zip(halves, mains, strict=True):
                copies[names[id(half)]] = main.detach().flatten().clone()
    return copies


@pytest.mark.ranks(1)
def test_what_joins_later_starts_from_its_weights(shared_tmp_path: Path) -> None:
    """In every dtype: the fp32 copies of what was frozen are its weights, and both kinds agree."""
    frozen = ("images.", "language.embedding", "language.decoder.layers.0.mlp")
    kinds = [("bf16", "experts"), ("fp16", "experts"), ("bf16", "tied"), ("fp16", "tied")]
    for dtype, kind in [*itertools.product(DTYPES, ("dense",)), *kinds]:
        losses = []
        for distributed in (False, True):
            row = Row("adam", distributed, dtype, kind)
            root = shared_tmp_path / str(row)
            with built(row, 1, frozen=frozen[: 3 if kind == "dense" else 1]) as first:
                first.steps(0, BEFORE)
                first.store(root).save(BEFORE, first.model, first.optimizer)
                kept = {} if dtype == "fp32" else fp32_copies(first)
            with built(row, 2) as second:
                second.store(root).load(BEFORE, second.model, second.optimizer)
                for name, copied in fp32_copies(second).items() if dtype != "fp32" else ():
                    weight = dict(second.model.named_parameters())[name].detach().flatten()
                    expected = kept.get(name, weight.float())
                    assert torch.equal(copied, expected), (str(row), name)
                losses.append(second.steps(BEFORE, AFTER))
        assert losses[0] == losses[1], (dtype, kind)


@pytest.mark.ranks(2)
def test_states_of_another_rank_or_kind_are_refused(shared_tmp_path: Path) -> None:
    sharded, whole = (Row("adam", each, "bf16", "dense") for each in (True, False))
    with built(sharded, 1) as one:
        one.steps(0, 1)
        mine = one.optimizer.state_dict()
        other = on_all_ranks(mine)[1 - torch.distributed.get_rank()]
        refused = [
            (other, r"holds shards of rank \d of 2, this is rank \d of 2.*sharded_state_dict"),
            ({n: _of_another_layout(s) for n, s in mine.items()}, r"\(or another layout\)"),
            ({n: _without_shards(s) for n, s in mine.items()}, "no tensors of the distributed"),
            ({"images": mine["images"]}, r"has no module 'language'; it holds \['images'\]"),
        ]
        for state, sentence in refused:
            with pytest.raises(ValueError, match=sentence):
                one.optimizer.load_state_dict(copy.deepcopy(state))
        with pytest.raises(ValueError, match="settings='old'; give 'run'.*'checkpoint'"):
            one.optimizer.load_state_dict(mine, settings="old")
        mine = copy.deepcopy(mine)
    with (
        built(whole, 1) as one,
        pytest.raises(
            ValueError, match="saved with use_distributed_optimizer=True.*this run has.*=False; set"
        ),
    ):
        one.optimizer.load_state_dict(mine)


def _of_another_layout(state: dict[str, Any]) -> dict[str, Any]:
    """With shards that would be copied into any others without an error."""
    shards = state["_mimo_shards"]
    short = [[{k: v[:1] for k, v in each.items()} for each in group] for group in shards["groups"]]
    return {**state, "_mimo_shards": {**shards, "groups": short}}


def _without_shards(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "_mimo_shards"}


@pytest.mark.ranks(2)
def test_a_loaded_state_stays_the_callers() -> None:
    """It can be loaded again, into another optimizer too, after the first one went on."""
    for distributed, kind in itertools.product((False, True), ("dense", "experts")):
        row = Row("adam", distributed, "bf16", kind)
        with built(row, 1) as first:
            first.steps(0, BEFORE)
            weights, state = copy.deepcopy((first.model.state_dict(), first.optimizer.state_dict()))
            kept = copy.deepcopy(state)
            losses = []
            for _ in range(2):
                first.model.load_state_dict(weights)
                first.optimizer.load_state_dict(state)
                losses.append(first.steps(BEFORE, AFTER))
            assert losses[0] == losses[1], str(row)
            assert _equal(state, kept), str(row)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


WRONG = [
    ("bf16", {"bf16": False}, r"'.*' of module '(language|images)' is torch.bfloat16 and .*bf16=F"),
    ("fp16", {"fp16": False}, r"is torch.float16 and .*fp16=False: set fp16=True, or build"),
    ("bf16", {"bf16": False, "fp16": True}, r"is torch.bfloat16 .*fp16=True: set bf16=True"),
    ("between", {"bf16": False}, r"of module 'language' is torch.bfloat16 and .*: set bf16=True"),
    ("inside", {"bf16": False}, r"is torch.bfloat16 and .*: set bf16=True"),
    ("fp16", {"bf16": True}, "bf16=True and fp16=True; set the one that the modules have"),
    (
        "fp32",
        {"bf16": True},
        "bf16=True and no parameter that trains is torch.bfloat16: set bf16=F",
    ),
    ("fp32", {"fp16": True}, "fp16=True and no parameter that trains is torch.float16: set fp16=F"),
    ("fp32", {"optimizer": "lion"}, "'lion' is not supported here; use 'adam', or 'sgd' with"),
]


@pytest.mark.ranks(1)
@pytest.mark.parametrize(("dtype", "changes", "sentence"), WRONG)
def test_dtypes_and_config_are_compared_when_the_optimizer_is_built(
    dtype: str, changes: dict[str, Any], sentence: str
) -> None:
    for distributed in (False, True):
        row = Row("adam", distributed, dtype, "dense")
        with pytest.raises(ValueError, match=sentence), built(row, 1, **changes):
            pass


@pytest.mark.ranks(1)
def test_what_does_not_train_may_be_of_another_dtype() -> None:
    """A frozen bf16 language model, an fp32 encoder that trains, and its fp32 optimizer."""
    config = {"bf16": False, "params_dtype": torch.float32}
    for distributed in (False, True):
        row = Row("adam", distributed, "between", "dense")
        with built(row, 1, frozen=("language.",), **config) as one:
            before = copy.deepcopy(one.model.state_dict())
            assert len(set(one.steps(0, BEFORE))) == BEFORE
            moved = [k for k, v in one.model.state_dict().items() if not _equal(v, before[k])]
            assert moved
            assert all("images" in name for name in moved)


NEW = {"lr": 0.02, "min_lr": 0.001, "weight_decay": 0.3, "adam_beta1": 0.8, "adam_eps": 1e-6}


def settings_of(one: Built) -> list[tuple]:
    keys = ("lr", "max_lr", "min_lr", "weight_decay", "betas", "eps")
    return [tuple(group[key] for key in keys) for group in one.optimizer.param_groups]


@pytest.mark.ranks(1)
@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "sharded"])
def test_what_a_new_run_changes_counts_and_the_rest_goes_on(
    distributed: bool, shared_tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Learning rates that were decayed by hand, with no schedule, stand for any position."""
    row = Row("adam", distributed, "bf16", "experts")
    with built(row, 1) as first:
        first.steps(0, BEFORE)
        for group in first.optimizer.param_groups:
            group["lr"] *= 0.5
        states = save(first, shared_tmp_path)
        before = settings_of(first)
        expected = first.steps(BEFORE, AFTER)
    for way in WAYS:
        with built(row, 2) as same:
            caplog.clear()
            load(same, way, shared_tmp_path, states)
            assert settings_of(same) == before
            assert "optimizer settings" not in caplog.text
            assert same.steps(BEFORE, AFTER) == expected
        for options in ({}, {"settings": "run"}):
            with built(row, 2, **NEW) as changed:
                caplog.clear()
                load(changed, way, shared_tmp_path, states, **options)
                values = (0.02, 0.02, 0.001, 0.3, (0.8, 0.999), 1e-6)
                assert settings_of(changed) == [values] * len(before)
                for part in (
                    "lr 0.01 -> 0.02 (this run's",
                    "weight_decay 0.01 -> 0.3",
                    "beta1 0.9",
                ):
                    assert caplog.text.count(part) == 1
                assert changed.steps(BEFORE, AFTER) != expected
        with built(row, 2, weight_decay=0.3) as decay:
            load(decay, way, shared_tmp_path, states)
            # The position of the learning rate goes on where only something else was changed.
            assert [(s[0], s[3]) for s in settings_of(decay)] == [(0.005, 0.3)] * len(before)
        with built(row, 2, **NEW) as kept:
            caplog.clear()
            load(kept, way, shared_tmp_path, states, settings="checkpoint")
            assert settings_of(kept) == before
            assert "lr 0.01 -> 0.02 (the saved one counts; settings='run'" in caplog.text
            assert kept.steps(BEFORE, AFTER) == expected


@pytest.mark.ranks(1)
@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "sharded"])
def test_groups_with_a_learning_rate_of_their_own(distributed: bool, shared_tmp_path: Path) -> None:
    """Stock knows groups by settings that these share; new, gone and changed ones load as well."""
    row = Row("adam", distributed, "bf16", "dense")
    with built(row, 1, decoupled_lr=0.03) as first:
        first.steps(0, BEFORE)
        states = save(first, shared_tmp_path)
        expected = first.steps(BEFORE, AFTER)
    for way, settings in itertools.product(WAYS, ("run", "checkpoint")):
        for lr, same in ((0.03, True), (0.001, settings == "checkpoint"), (None, False)):
            with built(row, 2, decoupled_lr=lr) as second:
                if lr is None and way == "state_dict":
                    with pytest.raises(ValueError, match="numbers other parameters: where it has"):
                        load(second, way, shared_tmp_path, states, settings=settings)
                    continue
                load(second, way, shared_tmp_path, states, settings=settings)
                wanted = {0.01, 0.03 if same else lr} - {None}
                assert {group["max_lr"] for group in second.optimizer.param_groups} == wanted
                assert {group["wd_mult"] for group in second.optimizer.param_groups} <= {0.0, 1.0}
                # Without a schedule nobody reads max_lr.
                assert second.steps(BEFORE, AFTER) == expected, (way, settings, lr)


@pytest.mark.ranks(1)
def test_multipliers_that_no_saved_group_has() -> None:
    """This run's settings count; where the saved ones are to count, that is refused by name."""
    row = Row("adam", False, "fp32", "dense")
    with built(row, 1) as one:
        one.steps(0, 1)
        state = copy.deepcopy(one.optimizer.state_dict())
        for part in state.values():
            for groups in (part["param_groups"], part["_mimo_settings"]["built"]):
                for group in groups:
                    group["wd_mult"] += 2.0
        for group in one.optimizer.param_groups:
            group["weight_decay"] = 0.25
        one.optimizer.load_state_dict(state)
        assert {group["weight_decay"] for group in one.optimizer.param_groups} == {0.25}
        assert {group["wd_mult"] for group in one.optimizer.param_groups} <= {0.0, 1.0}
        with pytest.raises(ValueError, match=r"multipliers \[.*3\.0.*\], those of this run.*'run'"):
            one.optimizer.load_state_dict(state, settings="checkpoint")


@pytest.mark.ranks(1)
def test_stocks_scheduler_beside_both_settings(shared_tmp_path: Path) -> None:
    """A new max_lr counts through the groups; weight decay through the scheduler's own flag."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    def scheduler(one: Built, lr: float, decay: float, override: bool) -> OptimizerParamScheduler:
        return OptimizerParamScheduler(
            one.optimizer,
            init_lr=0.0,
            max_lr=lr,
            min_lr=0.0,
            lr_warmup_steps=0,
            lr_decay_steps=10,
            lr_decay_style="linear",
            start_wd=decay,
            end_wd=decay,
            wd_incr_steps=10,
            wd_incr_style="constant",
            override_opt_param_scheduler=override,
            use_checkpoint_opt_param_scheduler=not override,
        )

    row = Row("adam", False, "fp32", "dense")
    with built(row, 1, min_lr=0.0) as first:
        schedule = scheduler(first, 0.01, 0.01, False)
        for number in range(BEFORE):
            first.step(number)
            schedule.step(1)
        states, position = save(first, shared_tmp_path), schedule.state_dict()
    for lr, override, settings, rate, decay in (
        (0.01, False, "run", 0.008, 0.01),
        (0.02, False, "run", 0.016, 0.01),
        (0.02, True, "run", 0.016, 0.5),
        (0.02, False, "checkpoint", 0.008, 0.01),
    ):
        with built(row, 2, lr=lr, min_lr=0.0, weight_decay=0.5) as second:
            schedule = scheduler(second, lr, 0.5, override)
            load(second, "store", shared_tmp_path, states, settings=settings)
            schedule.load_state_dict(position)
            schedule.step(0)  # stock takes the weight decay of the saved schedule from here on
            groups = second.optimizer.param_groups
            assert {round(group["lr"], 9) for group in groups} == {rate}
            assert {g["weight_decay"] for g in groups if g["wd_mult"]} == {decay}
