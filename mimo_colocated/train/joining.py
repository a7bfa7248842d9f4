# SPDX-License-Identifier: Apache-2.0
"""A vision tower and a language model that have not met become one LLaVA folder."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.ranks import hush
from mimo_colocated.launch.starts import CAN_FORK

_SETTINGS = ("image_token", "images", "language")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse other settings than :func:`join` takes.

    Raises:
        JobError: which it takes.
    """
    if sorted(settings) != sorted(_SETTINGS):
        raise JobError(
            f"model.settings of llava are {', '.join(_SETTINGS)}, got "
            f"{', '.join(sorted(settings)) or 'none'}"
        )


def check_before_ranks() -> None:
    """Refuse to join folders in a rank, whose process does not survive it.

    Raises:
        JobError: ranks are there already, and what to do.
    """
    if "RANK" in os.environ:
        raise JobError(
            "folders are joined before ranks start: run the recipe once with --dry-run, which "
            "writes the model, and then under torchrun"
        )


def join(settings: Mapping[str, Any], folder: Path) -> None:
    """Write the whole model, its projector drawn; a process does it that leaves nothing here.

    Args:
        settings: the folders ``images`` and ``language``, and ``image_token``, one of the language
            model's special tokens that texts do not have.
        folder: to write into.

    Raises:
        JobError: a folder or the token is wrong; ranks are there already.
    """
    check_before_ranks()
    # CUDA, which the launcher may have asked for devices, does not survive a fork.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    context: Any = multiprocessing.get_context("fork" if hidden and CAN_FORK else "spawn")
    answer, told = context.Pipe(duplex=False)
    process = context.Process(target=_join_and_tell, args=(dict(settings), folder, told))
    process.start()
    told.close()
    try:
        words = answer.recv()
        process.join()
    except EOFError:
        process.join()
        words = f"the process that joins the folders ended with exit code {process.exitcode}"
    if words:
        raise JobError(words)


def _join_and_tell(settings: Mapping[str, str], folder: Path, told: Any) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch.distributed as dist

    hush()
    from mimo_colocated.cli import models

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    words = ""
    try:
        with models.one_sentence():
            _join(settings, folder)
    except JobError as error:
        words = str(error)
    except Exception as error:  # nobody else tells
        words = f"the folders cannot be joined: {' '.join(str(error).split())}"
    told.send(words)
    dist.destroy_process_group()


def _join(settings: Mapping[str, str], folder: Path) -> None:
    from transformers import AutoTokenizer

    from megatron.core.models.mimo.huggingface.build import BuildOptions
    from megatron.core.models.mimo.huggingface.compose import from_folders
    from megatron.core.models.mimo.huggingface.export import to_folder
    from mimo_colocated.cli import models
    from mimo_colocated.launch.layouts import LANGUAGE, Layout

    images, language = (Path(settings[name]).expanduser() for name in ("images", "language"))
    tokenizer = AutoTokenizer.from_pretrained(language)
    token = settings["image_token"]
    number = tokenizer.get_vocab().get(token)
    if number is None:
        raise JobError(
            f"model.settings.image_token={token!r} is no token of {language}; name one of its "
            "special tokens that texts do not have"
        )
    built = from_folders(
        {"images": Layout(), LANGUAGE: Layout()},
        BuildOptions(dtype=models.torch_dtype(models.folder_dtype(language))),
        images=images,
        language=language,
        token_id=number,
    )
    whole = folder / "whole"
    to_folder(built, whole)
    _processor(images, tokenizer, token, built.composite.encoders[0].config).save_pretrained(whole)
    for path in list(whole.iterdir()):
        path.replace(folder / path.name)
    whole.rmdir()


def _processor(images: Path, tokenizer: Any, token: str, vision: Any) -> Any:
    """LLaVA's processor, of the tower's images and the language model's text."""
    from transformers import AutoImageProcessor, LlavaProcessor

    clip = vision.model_type == "clip_vision_model"
    return LlavaProcessor(
        AutoImageProcessor.from_pretrained(images),
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default" if clip else "full",
        num_additional_image_tokens=int(clip),
        image_token=token,
        chat_template=tokenizer.chat_template,
    )
