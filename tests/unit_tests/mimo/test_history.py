# SPDX-License-Identifier: Apache-2.0
"""The line of checkpoints: going back ends what came after, and no kill loses anything.

Folders with a file or two stand for checkpoints; every case runs in one process. A kill is an
exception in place of a call that changes the disk, with nothing after it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron.core.models.mimo.checkpoint import history
from megatron.core.models.mimo.checkpoint.errors import CheckpointError
from megatron.core.models.mimo.checkpoint.history import History, remove_partial
from megatron.core.models.mimo.checkpoint.manifest import Manifest

pytestmark = pytest.mark.once


class Killed(BaseException):
    """What no handler of errors sees."""


def save(line: History, step: int, content: str) -> str | None:
    """Write and publish a checkpoint that holds ``content``, as the store does it."""
    line.begin(step, 0)
    (line.partial(step) / "__0_0.distcp").write_text(content)
    moved = line.publish(Manifest(step, {}, 1, {}, {"content": content}))
    line.stands_at = step
    line.rotate()
    return moved


def run(root: Path, stands_at: int = -1, keep: int = 2) -> History:
    """A run that goes on from ``stands_at``."""
    line = History(root, keep)
    line.stands_at = stands_at
    return line


def below(folder: Path) -> dict[int, str]:
    """Step -> content of the complete checkpoints of a folder."""
    here = History(folder, 1)
    return {step: here.manifest(step).extra["content"] for step in here.steps()}


def everything(root: Path) -> set[tuple[int, str]]:
    """Every complete checkpoint, on the line or not."""
    shelves = root.glob("abandoned/*")
    return {pair for folder in (root, *shelves) for pair in below(folder).items()}


def two_runs(root: Path, *steps: int) -> None:
    """Checkpoints of a first run."""
    first = run(root, keep=9)
    for step in steps:
        assert save(first, step, f"first {step}") is None


# ---- going back -------------------------------------------------------------------------------


def test_a_step_saved_again_holds_the_new_weights(tmp_path: Path) -> None:
    two_runs(tmp_path, 100, 200)
    moved = save(run(tmp_path, stands_at=100), 200, "second 200")
    assert below(tmp_path) == {100: "first 100", 200: "second 200"}
    assert below(tmp_path / "abandoned" / "1") == {200: "first 200"}
    assert moved is not None
    assert "went on from step 100: " in moved
    assert f"after that, 200, are now in {tmp_path / 'abandoned' / '1'}" in moved


def test_what_is_kept_is_the_newest_of_the_line(tmp_path: Path) -> None:
    two_runs(tmp_path, 100, 200, 300)
    second = run(tmp_path, stands_at=100)
    assert "200, 300" in str(save(second, 150, "second 150"))
    assert below(tmp_path) == {100: "first 100", 150: "second 150"}
    # Said once: the line holds no strangers any more.
    assert save(second, 160, "second 160") is None
    assert below(tmp_path) == {150: "second 150", 160: "second 160"}
    assert below(tmp_path / "abandoned" / "1") == {200: "first 200", 300: "first 300"}


@pytest.mark.parametrize(
    ("stands_at", "step", "stay"),
    [
        (-1, 50, set()),  # nothing loaded: a new run, whatever lies there
        (-1, 400, set()),
        (0, 50, set()),  # step 0 was loaded, which is not on the disk any more
        (100, 101, {100}),
        (200, 300, {100, 200}),
        (300, 400, {100, 200, 300}),
        (300, 150, {100}),  # back without a load
        (300, 300, {100, 200}),  # the same step once more
    ],
)
def test_who_leaves_the_line(stands_at: int, step: int, stay: set[int], tmp_path: Path) -> None:
    two_runs(tmp_path, 100, 200, 300)
    line = run(tmp_path, stands_at, keep=9)
    assert set(line.steps()) - set(line.abandoned_by(step)) == stay
    save(line, step, "second")
    assert set(line.steps()) == stay | {step}
    firsts = {(s, f"first {s}") for s in (100, 200, 300)}
    assert everything(tmp_path) == firsts | {(step, "second")}


def test_every_going_back_has_a_folder_of_its_own(tmp_path: Path) -> None:
    two_runs(tmp_path, 1, 2)
    (tmp_path / "abandoned" / "notes").mkdir(parents=True)  # a user's
    save(run(tmp_path, 1), 2, "second")
    save(run(tmp_path, 1), 2, "third")
    shelves = {p.name: below(p) for p in (tmp_path / "abandoned").iterdir()}
    assert shelves == {"1": {2: "first 2"}, "2": {2: "second"}, "notes": {}}
    assert below(tmp_path) == {1: "first 1", 2: "third"}


def test_a_folder_of_abandoned_checkpoints_may_be_removed(tmp_path: Path) -> None:
    two_runs(tmp_path, 1, 2)
    for content in ("second", "third"):
        save(run(tmp_path, 1), 2, content)
    shutil.rmtree(tmp_path / "abandoned" / "1")
    save(run(tmp_path, 1), 2, "fourth")
    shelves = {p.name: below(p) for p in (tmp_path / "abandoned").iterdir()}
    assert shelves == {"2": {2: "second"}, "3": {2: "third"}}


def test_a_load_moves_nothing(tmp_path: Path) -> None:
    two_runs(tmp_path, 100, 200)
    line = run(tmp_path, 100)
    line.manifest(100)
    assert below(tmp_path) == {100: "first 100", 200: "first 200"}


def test_steps_of_nine_digits_are_steps(tmp_path: Path) -> None:
    two_runs(tmp_path, 99_999_999, 100_000_000)
    assert run(tmp_path).steps() == [99_999_999, 100_000_000]


# ---- kills ------------------------------------------------------------------------------------


@contextmanager
def changes_of_the_disk(before: Callable[[str, Path], None]) -> Iterator[None]:
    """Call ``before(what, path)`` ahead of every change that this package makes."""
    real = {name: getattr(os, name) for name in ("rename", "fsync", "open")}
    rmtree, mkdir, write = shutil.rmtree, Path.mkdir, Path.write_text
    opened: dict[int, Path] = {}

    def noted_open(path: Path, *args: object) -> int:
        fd = real["open"](path, *args)
        opened[fd] = Path(path)
        return fd

    def noted(what: str, call: Callable, path: Path, *args: object, **kwargs: object) -> object:
        before(what, Path(path))
        return call(path, *args, **kwargs)

    def fsync(fd: int) -> None:
        before("fsync", opened[fd])
        real["fsync"](fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history.os, "open", noted_open)
        patch.setattr(history.os, "fsync", fsync)
        patch.setattr(history.os, "rename", lambda a, b: noted("rename", real["rename"], a, b))
        patch.setattr(history.shutil, "rmtree", lambda p, **k: noted("remove", rmtree, p, **k))
        patch.setattr(Path, "mkdir", lambda p, *a, **k: noted("mkdir", mkdir, p, *a, **k))
        patch.setattr(Path, "write_text", lambda p, *a, **k: noted("write", write, p, *a, **k))
        yield


def test_a_kill_at_any_change_loses_nothing(tmp_path: Path) -> None:
    """Whatever happened before the kill: all is there, whole, and the newest is one of two."""
    newest_seen, number = [], 0
    while True:
        root, left = tmp_path / str(number), [number]
        two_runs(root, 100, 200, 300)

        def count(_what: str, _path: Path, left: list[int] = left) -> None:
            if not left[0]:
                raise Killed
            left[0] -= 1

        second = run(root, stands_at=100, keep=2)
        try:
            with changes_of_the_disk(count):
                save(second, 150, "second 150")
        except Killed:
            pass
        else:
            break
        firsts = {(100, "first 100"), (200, "first 200"), (300, "first 300")}
        assert firsts <= everything(root) <= firsts | {(150, "second 150")}
        newest_seen.append(max(below(root)))
        # Going back once more completes what was begun, with nothing left of the half.
        assert save(run(root, stands_at=100), 150, "third 150") or newest_seen[-1] == 100
        assert below(root) == {100: "first 100", 150: "third 150"}
        assert firsts <= everything(root)
        assert not list(root.glob(".saving_*"))
        number += 1
    # The abandoned run is the newest until all of it is aside, then what it went back to.
    assert sorted(set(newest_seen)) == [100, 150, 300]
    assert newest_seen == sorted(newest_seen, key=[300, 100, 150].index)


def test_what_is_on_the_disk_before_what(tmp_path: Path) -> None:
    """Files before the name that shows them; the name before anything old moves on or goes."""
    two_runs(tmp_path, 100, 110, 200)
    log: list[tuple[str, str]] = []
    line = run(tmp_path, stands_at=110, keep=2)
    with changes_of_the_disk(
        lambda what, path: log.append((what, str(path.relative_to(tmp_path))))
    ):
        save(line, 150, "second")
    partial = ".saving_00000150"
    shown = log.index(("rename", partial))
    flushed = {path for what, path in log[:shown] if what == "fsync"}
    assert {f"{partial}/__0_0.distcp", f"{partial}/mimo.json", partial} <= flushed
    aside = log.index(("rename", "step_00000200"))
    assert log.index(("fsync", partial)) < aside
    assert log[aside + 1 : aside + 3] == [("fsync", "abandoned/1"), ("fsync", ".")]
    assert aside + 3 == shown
    gone = log.index(("rename", "step_00000100"))
    assert log[shown + 1 : gone] == [("fsync", ".")]
    hidden = ".saving_over_00000100"
    assert log[gone + 1 :] == [("fsync", "."), ("remove", hidden)]


def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    """As one that was copied to where a job looks for another step."""
    two_runs(tmp_path, 100)
    shutil.copytree(tmp_path / "step_00000100", tmp_path / "step_00000200")
    said = r"step_00000200 cannot be read \(its mimo\.json is not that of step 200\); remove that"
    with pytest.raises(CheckpointError, match=said):
        run(tmp_path).manifest(200)
    assert run(tmp_path).manifest(100).step == 100


def test_removing_leftovers_says_what_went(tmp_path: Path) -> None:
    (tmp_path / ".saving_00000009").mkdir()
    two_runs(tmp_path, 1)  # its save removes them
    (tmp_path / ".saving_00000008").mkdir()
    assert remove_partial(tmp_path) == [".saving_00000008"]
    assert remove_partial(tmp_path / "absent") == []
    assert below(tmp_path) == {1: "first 1"}
