# SPDX-License-Identifier: Apache-2.0
"""The ways of rows: two kinds in one model, and a third kind that this file adds.

All ranks are threads of one process. What ``mixed`` computes in stages is in ``test_stage_side``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.config import base_configs
from megatron.core.models.mimo.model import paths
from megatron.core.models.mimo.model.gathered_path import GatheredPath
from megatron.core.models.mimo.model.language_batch import LanguageBatch
from megatron.core.models.mimo.model.leaves import Leaves
from megatron.core.models.mimo.model.mixed_path import MixedPath
from megatron.core.models.mimo.model.routed_path import RoutedPath
from megatron.core.models.mimo.model.row_path import Runners
from megatron.core.models.mimo.partition.utils import Sharded
from tests.unit_tests.mimo.test_stage_side import Case, Result, gradient_of

IMAGES = ([2, 2, 2, 2], [0, 0, 0, 0], [1, 3, 4, 0])
SOUNDS = ([0, 2, 1, 1], [1, 1, 0, 2], [0, 0, 0, 0])
ALONE = Case((1, 1), (1, 1, 1, 1), hears=(1, 1), images=IMAGES, sounds=SOUNDS)
MIXED = replace(
    ALONE,
    src=(1, 8),
    dest=(1, 4, 1, 2),
    hears=(2, 4),
    dims=("tp", "cp", "pp", "dp"),
    options={"bridge": {"images": "gather", "sounds": "routed"}},
)


def whole_steps(case: Case, rank: int, model: MimoModel) -> Result:
    """Forward and backward of each microbatch, without stages."""
    fused = []
    for number in range(len(case.images)):
        model(**case.inputs(rank, number))
        given = model.language_model.called_with["decoder_input"]
        given.backward(case.part(rank, gradient_of(number)))
        fused.append(given.detach())
    return Result(fused, {n: p.grad for n, p in model.modality_submodules.named_parameters()})


@pytest.mark.parametrize("case", [MIXED, replace(MIXED, dest=(2, 2, 1, 2), sequence_parallel=True)])
def test_modalities_of_one_model_over_bridges_of_two_kinds(case: Case) -> None:
    (whole,) = ALONE.run(whole_steps)
    results = case.run(whole_steps)
    for rank, result in enumerate(results):
        for part, expected in zip(result.fused, whole.fused, strict=True):
            assert torch.equal(part, case.part(rank, expected))
    for key, expected in whole.gradients.items():
        total = torch.stack([result.gradients[key] for result in results]).sum(dim=0)
        copies = (case.src if key.startswith("images") else case.hears)[0]
        torch.testing.assert_close(total / copies, expected, rtol=1e-5, atol=1e-6)
        assert expected.norm() > 0.5


def test_the_way_is_chosen_once_by_modality() -> None:
    def way(_case: Case, _rank: int, model: MimoModel) -> tuple[str, frozenset[str]]:
        assert model._row_path is model._row_path
        return type(model._row_path), model._row_path.backward_per_microbatch

    assert MIXED.run(way) == [(MixedPath, {"images"})] * 8
    both = {"images": "gather", "sounds": "gather"}
    assert replace(MIXED, options={"bridge": both}).run(way)[0] == (
        GatheredPath,
        {"images", "sounds"},
    )
    both = {"images": "routed", "sounds": "routed"}
    assert replace(MIXED, options={"bridge": both}).run(way)[0] == (RoutedPath, frozenset())


def test_the_routed_side_hears_what_the_gathered_side_refuses() -> None:
    def one_without_images(case: Case, rank: int, model: MimoModel) -> str | None:
        batch = case.inputs(rank, 0)
        if rank == 2:
            batch["modality_inputs"]["images"] = None
        try:
            model(**batch)
        except (ValueError, RuntimeError) as refusal:
            return str(refusal)
        return None

    told = MIXED.run(one_without_images)
    words = "images inputs are missing, but matching special tokens exist"
    # One exchange group of sounds: the ranks of one language replica.
    assert all(words in text and "rank 2" in text for text in told[:4])
    assert told[4:] == [None] * 4


def test_what_is_heard_over_either_kind_of_bridge_is_heard() -> None:
    class Hears:
        """A way over whose bridges another rank tells of a problem."""

        input_balances: Mapping[str, Any] = {}

        def __init__(self, other: int) -> None:
            self.other = other

        def exchange_problems(self, problems: Mapping[int, str], count: int) -> dict[int, str]:
            return {**problems, self.other: f"one of {count}"}

    gathered: Any = Hears(1)
    routed: Any = Hears(2)
    found = MixedPath(gathered, routed).exchange_problems({0: "own"}, 3)
    assert found == {0: "own", 1: "one of 3", 2: "one of 3"}


@pytest.mark.parametrize(
    "bridge, words",
    [
        ({"images": "gather"}, r"bridge is given for \['images'\], but the model's modalities are"),
        ({"images": "gather", "sounds": "tunnel"}, "must be one of .*, got 'tunnel'"),
    ],
)
def test_a_bridge_for_each_modality_and_each_is_known(bridge: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(ALONE, options={"bridge": bridge}).run(whole_steps)


# -- a third kind: rows stay where they are --------------------------------------------------


class SameRank:
    """A bridge between layouts that are one: nothing to do."""

    def destroy(self) -> None:
        """Nothing was made."""


@dataclass(frozen=True)
class Kept:
    """Rows of one microbatch."""

    batch: LanguageBatch
    rows: dict[str, torch.Tensor]


class SameRankPath:
    """Rows meet the text of the samples that they were encoded from."""

    bridge_kind = SameRank
    takes_route_plans = False
    backward_per_microbatch = frozenset({"images", "sounds"})

    def __init__(self, names: list[str], runners: Runners) -> None:
        self._names, self._runners = names, runners

    @classmethod
    def build(cls, names: list[str], runners: Runners, options: Any) -> SameRankPath:
        return cls(names, runners)

    @staticmethod
    def make_bridge(config: Any, options: Any, **ends: Any) -> SameRank:
        return SameRank()

    def plan(self, batch: LanguageBatch, inputs: Any, route_plan: Any) -> Kept:
        language = self._runners.language
        batch, tokens = language.prepared(batch), language.count_tokens(batch.input_ids)
        return Kept(batch, self._runners.encoders.run_present(self._names, inputs, tokens))

    def move(self, planned: Kept) -> dict[str, torch.Tensor]:
        return planned.rows

    def move_together(self, planned: Iterable[Kept], leaves: Leaves) -> list[dict[str, Any]]:
        return [
            {
                name: leaves.cut(row, [torch.arange(len(row))], None)[0]
                for name, row in each.rows.items()
            }
            for each in planned
        ]

    def fuse(self, batch: LanguageBatch, moved: dict[str, torch.Tensor]) -> Sharded:
        return self._runners.language.cut(batch, self._runners.language.fuse(batch, moved))

    def exchange_problems(self, problems: Mapping[int, str], count: int) -> dict[int, str]:
        return dict(problems)


@pytest.fixture
def same_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_configs, "BRIDGES", list(base_configs.BRIDGES))
    monkeypatch.setattr(paths, "_PATHS", dict(paths._PATHS))
    paths.register_path("same-rank", SameRankPath)


def train(case: Case, rank: int, model: MimoModel) -> list[float]:
    """Losses of four steps of SGD, one whole and one in stages in turn."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.001), []
    for number in range(4):
        batch = case.inputs(rank, number % 2)
        if number % 2:
            encoded = model.encode_microbatches([batch])
            del batch["modality_inputs"]
            output, _ = model.forward_stage(model.language_model, *encoded.microbatches, **batch)
        else:
            encoded = SimpleNamespace(backward=lambda: None)
            output, _ = model(**batch)
        loss = (output - 1).square().mean()
        loss.backward()
        encoded.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_third_kind_trains(same_rank: None) -> None:
    case = Case((1, 4), (1, 1, 1, 4), images=([2, 2, 2, 2], [1, 1, 1, 1]))
    losses = replace(case, options={"bridge": "same-rank"}).run(train)
    assert losses == replace(case, options={"bridge": "gather"}).run(train)
    assert all(one[2] < one[0] and one[3] < one[1] for one in losses)
    with pytest.raises(ValueError, match="a bridge is called 'same-rank' already"):
        paths.register_path("same-rank", SameRankPath)


def test_other_kinds_cannot_be_mixed(same_rank: None) -> None:
    bridges = {"images": "same-rank", "sounds": "routed"}
    with pytest.raises(ValueError, match="only 'gather' and 'routed' can be mixed"):
        replace(ALONE, options={"bridge": bridges}).run(lambda case, rank, model: model._row_path)
