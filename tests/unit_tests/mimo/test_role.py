# SPDX-License-Identifier: Apache-2.0
"""Which modules a rank runs. One process; grids are stand-ins and the rank is patched."""

from __future__ import annotations

import pytest

from megatron.core.models.mimo.config import role as role_module
from megatron.core.models.mimo.config.role import (
    MIMO_LANGUAGE_MODULE_KEY,
    ModuleLayout,
    ModuleStageInfo,
    RankRole,
)
from tests.unit_tests.mimo.model_stubs import StubGrid, StubGroup


def span(start: int, size: int, stage: int = 0, stages: int | None = None) -> StubGrid:
    """A grid over some ranks; with ``stages`` this rank stands at ``stage`` of its pipeline."""
    if stages is None:
        return StubGrid(start, size, [size], ["dp"])
    return StubGrid(start, size, [size], ["pp"], {"pp": StubGroup(stages, stage)})


def build_on(rank: int, grids: dict[str, StubGrid], monkeypatch) -> RankRole:
    monkeypatch.setattr(role_module.dist, "get_rank", lambda: rank)
    names = [name for name in grids if name != MIMO_LANGUAGE_MODULE_KEY]
    return RankRole.build(names, grids)


def test_the_language_key():
    assert MIMO_LANGUAGE_MODULE_KEY == "language"


@pytest.mark.parametrize(
    "grids", [None, {"images": span(0, 8), "audio": span(0, 8), "language": span(0, 8)}]
)
def test_colocated_ranks_run_everything(grids):
    role = RankRole.build(["images", "audio"], grids)
    assert role.mode is ModuleLayout.COLOCATED
    assert list(role.modules) == ["images", "audio", "language"]
    assert all(stage == ModuleStageInfo(True, True) for stage in role.modules.values())
    assert role.has_modality_modules
    assert role.has_language_module


@pytest.mark.parametrize(
    ("rank", "modules"), [(0, ["images"]), (3, ["images"]), (4, ["language"]), (7, ["language"])]
)
def test_disjoint_ranks_run_one_side(rank, modules, monkeypatch):
    role = build_on(rank, {"images": span(0, 4), "language": span(4, 4)}, monkeypatch)
    assert role.mode is ModuleLayout.NON_COLOCATED
    assert list(role.modules) == modules
    assert role.has_language_module == (modules == ["language"])
    assert role.has_modality_modules == (modules == ["images"])
    assert role.modality_module_names == [name for name in modules if name != "language"]


def test_without_a_language_model_the_encoders_ranks_are_theirs(monkeypatch):
    role = build_on(3, {"images": span(0, 2), "audio": span(2, 2)}, monkeypatch)
    assert list(role.modules) == ["audio"]
    assert not role.has_language_module


def test_encoders_may_share_ranks_with_each_other(monkeypatch):
    grids = {"images": span(0, 4), "audio": span(2, 2), "language": span(4, 4)}
    assert build_on(1, grids, monkeypatch).modality_module_names == ["images"]
    assert build_on(2, grids, monkeypatch).modality_module_names == ["images", "audio"]


@pytest.mark.parametrize(
    ("stage", "first", "last"), [(0, True, False), (1, False, False), (2, False, True)]
)
def test_pipeline_stages(stage, first, last, monkeypatch):
    grids = {"images": span(0, 1), "language": span(1, 3, stage, 3)}
    role = build_on(1 + stage, grids, monkeypatch)
    assert role.is_first_stage("language") is first
    assert role.is_last_stage("language") is last


def test_a_module_of_other_ranks_has_no_stage_here(monkeypatch):
    role = build_on(0, {"images": span(0, 4), "language": span(4, 4)}, monkeypatch)
    assert role.is_first_stage("images")
    assert not role.is_first_stage("language")
    assert not role.is_last_stage("language")


def test_a_rank_without_a_module(monkeypatch):
    grids = {"images": span(0, 2), "language": span(2, 2)}
    with pytest.raises(RuntimeError, match=r"Rank 5 is not in any module grid.*'language': '2..3'"):
        build_on(5, grids, monkeypatch)


@pytest.mark.parametrize(
    ("start", "size", "shared"), [(0, 8, 4), (2, 4, 2), (1, 2, 2)], ids=["all", "end", "middle"]
)
def test_partly_shared_ranks_are_refused(start, size, shared, monkeypatch):
    """All of the encoder's, its last ones, or some in the middle."""
    grids = {"images": span(0, 4), "language": span(start, size)}
    words = rf"shares {shared} ranks .* 'language' grid \(ranks {start}..{start + size - 1}\)"
    with pytest.raises(ValueError, match=r"'images' grid \(ranks 0..3\) " + words):
        build_on(0, grids, monkeypatch)
