# SPDX-License-Identifier: Apache-2.0
"""A rank that cannot read is one sentence on all ranks, before their next collective."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import transformers

from megatron.core.models.mimo.huggingface import compose, folder, logits_check, weights
from megatron.core.models.mimo.huggingface.build import from_folder
from megatron.core.models.mimo.huggingface.folder import FolderError, ModelFolder
from megatron.core.models.mimo.huggingface.own_encoders import tower_part
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import models
from tests.unit_tests.mimo.tiny_modules import on_all_ranks

pytestmark = [pytest.mark.ranks(8), pytest.mark.once]

LANGUAGE = {"language": Layout(tp=2, cp=2, dp=2)}
BOTH = {"images": Layout(dp=8), **LANGUAGE}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
DISK = OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, a tower and a CLIP, below one folder."""
    where = on_all_ranks(tmp_path_factory.mktemp("source"))[0]
    if dist.get_rank() == 0:
        models.DENSE["qwen2-tied"]().save_pretrained(where / "model")
        transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)).save_pretrained(where / "dino")
        clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES))
        clip.save_pretrained(where / "clip")
    dist.barrier()
    return where


def told(error: pytest.ExceptionInfo) -> str:
    """The error's words, the same on all ranks."""
    (words,) = set(on_all_ranks(str(error.value)))
    return words


def fails_on(rank: int, patch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception) -> None:
    """A function fails on one rank, whatever it is given."""

    def fail(*_given: Any, **_named: Any) -> None:
        raise error

    if dist.get_rank() == rank:
        patch.setattr(owner, name, fail)


class Broken:
    """A file whose disk fails when it is read."""

    def seek(self, _place: int) -> None:
        """As a file."""

    def readinto(self, _into: object) -> int:
        """Fail."""
        raise DISK


def its_disk_fails(patch: pytest.MonkeyPatch) -> None:
    if dist.get_rank() == 5:
        patch.setattr(ModelFolder, "_handle", lambda *_: Broken())


def a_file_is_cut_short(patch: pytest.MonkeyPatch) -> None:
    """After its header was read: the file is another one by then."""
    if dist.get_rank() == 3:
        patch.setattr(ModelFolder, "_handle", lambda *_: io.BytesIO())


def has_no_room(patch: pytest.MonkeyPatch) -> None:
    fails_on(6, patch, ModelFolder, "read", RuntimeError("out of memory"))


def sees_no_folder(patch: pytest.MonkeyPatch) -> None:
    gone = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "header")
    fails_on(2, patch, folder.os, "fstat", gone)


def lacks_a_line(patch: pytest.MonkeyPatch) -> None:
    """As a table that misses a parameter of one pipeline stage."""
    fails_on(7, patch, weights, "_held", ValueError("'language' has a parameter x"))


def cannot_read_the_tower(patch: pytest.MonkeyPatch) -> None:
    fails_on(1, patch, transformers.AutoModel, "from_pretrained", OSError("no file named x"))


def from_model(source: Path) -> None:
    from_folder(source / "model", LANGUAGE)


def with_tower(source: Path) -> None:
    dino = tower_part("images", source / "dino", token_id=9)
    from_folder(source / "model", BOTH, encoders=[dino])


def of_two(source: Path) -> None:
    compose.from_folders(BOTH, images=source / "clip", language=source / "model", token_id=9)


@pytest.mark.parametrize(
    ("breaks", "reads", "sentence"),
    [
        (its_disk_fails, from_model, r"rank 5 could not load the weights of \S+model: \S+model."
         r"safetensors cannot be read: Input/output error$"),
        (its_disk_fails, of_two, "rank 5 could not load the weights of .* Input/output error$"),
        (a_file_is_cut_short, from_model, r"rank 3 could not load the weights of \S+model: \S+"
         "model.safetensors was cut short while it was read$"),
        (has_no_room, from_model, r"rank 6 could not load .*: RuntimeError: out of memory$"),
        (sees_no_folder, from_model, r"rank 2 could not open \S+model: \S+ cannot be read: No such "
         "file or directory$"),
        (sees_no_folder, of_two, r"rank 2 could not open \S+clip and \S+model: \S+ cannot be read"),
        (lacks_a_line, from_model, "rank 7 could not name its parameters: ValueError: 'language'"),
        (cannot_read_the_tower, with_tower, "rank 1 could not make the encoders: no file named x$"),
    ],
)  # fmt: skip
def test_what_one_rank_cannot_read_is_one_sentence_on_all(
    breaks: Callable[[pytest.MonkeyPatch], None],
    reads: Callable[[Path], None],
    sentence: str,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        breaks(patch)
        with pytest.raises(FolderError, match=sentence) as refused:
            reads(source)
    told(refused)


def test_what_is_wrong_on_all_is_said_as_it_is(source: Path) -> None:
    with pytest.raises(FolderError, match="^.*nothing does not exist; give a folder") as refused:
        from_folder(source / "nothing", LANGUAGE)
    told(refused)


def test_transformers_that_fail_on_the_first_rank_fail_on_all(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = from_folder(source / "model", LANGUAGE)
    with monkeypatch.context() as patch:
        patch.setattr(logits_check.LogitsCheck, "_their_logits", lambda *_: 1 / 0)
        with pytest.raises(FolderError, match="rank 0 could not run transformers: ZeroDiv") as said:
            list(logits_check.LogitsCheck(built).cases())
        told(said)
        fails_on(0, patch, transformers.Qwen2ForCausalLM, "from_pretrained", OSError("no room"))
        with pytest.raises(FolderError, match="rank 0 could not open the folder with tra") as said:
            logits_check.LogitsCheck(built)
        told(said)
    built.destroy()


def test_tensors_that_are_stored_twice_are_compared_by_ranks_that_can_read(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison reads weights before any is loaded."""
    fails_on(4, monkeypatch, weights, "_untied", FolderError("x cannot be read"))
    with pytest.raises(FolderError, match="rank 4 could not read .*model: x cannot be") as refused:
        from_model(source)
    told(refused)
