# SPDX-License-Identifier: Apache-2.0
"""Models that a recipe has made before it trains them, as Hugging Face folders like any other."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mimo_colocated.launch.errors import JobError, did_you_mean
from mimo_colocated.train.easy_vqa_model import write_easy_vqa
from mimo_colocated.train.joining import check_before_ranks, check_settings, join
from mimo_colocated.train.recipe import Recipe
from mimo_colocated.train.stages import Stage

_SIZES: dict[str, int] = {
    "patch": 8,
    "vision_width": 128,
    "vision_layers": 3,
    "vision_heads": 4,
    "width": 128,
    "layers": 2,
    "heads": 4,
    "seed": 0,
}
_TEXT_SIZES: dict[str, int] = {
    "width": 1024,
    "layers": 24,
    "heads": 16,
    "inner": 4096,
    "vocabulary": 50304,
    "experts": 0,
    "chosen": 2,
    "expert_layers": 2,
    "positions": 1024,
    "seed": 0,
}
_DEFAULTS: dict[str, dict[str, int]] = {"easy-vqa": _SIZES, "text": _TEXT_SIZES}
_MADE = "made.json"


def model_folder(recipe: Recipe) -> Path:
    """Return the model's folder, which is made first if the recipe says so.

    Raises:
        JobError: it cannot be made.
    """
    if recipe.model.from_run:
        return Stage.of(recipe).folder()
    if not recipe.model.make:
        return Path(recipe.model.folder).expanduser()
    place = Path(recipe.run.out) / "model"
    return make_model(recipe.model.make, recipe.model.settings, place, recipe.run.timeout)


def make_model(
    name: str, settings: Mapping[str, Any], folder: Path, wait_s: float = 600.0
) -> Path:
    """Make a recipe's model, unless it is there; the folder appears when it is whole.

    Under a launcher rank 0 makes it and the others wait.

    Args:
        name: of the maker.
        settings: of the model, such as its sizes.
        folder: to write.
        wait_s: seconds that a rank waits for it.

    Raises:
        JobError: no such maker or setting, what is in the folder was made in another way, or it
            cannot be written.
    """
    whole = _whole(name, settings)
    if not _is_there(folder):
        if name == "llava":
            check_before_ranks()
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            _wait(folder, rank, wait_s)
        else:
            _make(name, whole, folder)
    _check_made(name, whole, folder)
    return folder


def _whole(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with what is not given."""
    if name not in MAKERS:
        raise JobError(f"model.make={name!r} is not known; known are {', '.join(MAKERS)}")
    if name == "llava":
        check_settings(settings)
        return dict(settings)
    known = _DEFAULTS[name]
    unknown = settings.keys() - known.keys()
    if unknown:
        meant = did_you_mean(min(unknown), known)
        raise JobError(
            f"model.settings.{min(unknown)} is not known; {meant}{name} takes {', '.join(known)}"
        )
    whole = {**known, **settings}
    if whole.get("experts") and whole["chosen"] < 2:
        raise JobError(
            f"model.settings.chosen={whole['chosen']}; experts are weighted among those that are "
            "chosen, so choose at least 2"
        )
    return whole


def _is_there(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _make(name: str, settings: Mapping[str, Any], folder: Path) -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()  # one line says it, below
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        MAKERS[name](settings, temporary)
        said = {"make": name, "settings": settings}
        (temporary / _MADE).write_text(json.dumps(said, default=str, indent=2) + "\n")
        temporary.replace(folder)
        print(f"wrote the model into {folder}", flush=True)
    except OSError as error:
        if not _is_there(folder):  # else another process was faster
            reason = error.strerror or str(error)
            raise JobError(f"the model cannot be written to {folder} ({reason})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _wait(folder: Path, rank: int, wait_s: float) -> None:
    end = time.monotonic() + wait_s
    while not _is_there(folder):
        if time.monotonic() > end:
            raise JobError(
                f"rank {rank} sees no model in {folder} after {wait_s:g} s; rank 0 makes it, in a "
                "folder that all ranks have to see: set run.out to one, or a longer run.timeout"
            )
        time.sleep(0.05)


def _check_made(name: str, settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model that was made in another way; settings that came later had their defaults."""
    try:
        said = json.loads((folder / _MADE).read_text())
        made, had = said["make"], {**_DEFAULTS.get(name, {}), **said["settings"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JobError(
            f"{folder} holds a model that does not say how it was made; move it away, or use "
            "another run.out"
        ) from error
    wanted = json.loads(json.dumps(settings, default=str))
    pairs = [("model.make", made, name)]
    pairs += [(f"model.settings.{each}", had.get(each), wanted[each]) for each in wanted]
    for field, was, now in pairs:
        if was != now:
            raise JobError(
                f"{folder} holds a model that has {field}={was}, this recipe has {now}; use "
                "another run.out, or move it away"
            )


def _text(settings: Mapping[str, Any], folder: Path) -> None:
    """Write a language model alone in the shape of Qwen3, with experts where some are asked for."""
    import torch
    import transformers

    sizes = settings
    shape = {
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["heads"],
        "head_dim": sizes["width"] // sizes["heads"],
        "intermediate_size": sizes["inner"],
        "vocab_size": sizes["vocabulary"],
        "max_position_embeddings": sizes["positions"],
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config: Any = transformers.Qwen3Config(**shape)
    if sizes["experts"]:
        config = transformers.Qwen3MoeConfig(
            **shape,
            num_experts=sizes["experts"],
            num_experts_per_tok=sizes["chosen"],
            decoder_sparse_step=sizes["expert_layers"],
            moe_intermediate_size=sizes["inner"],
            norm_topk_prob=True,
        )
    with torch.random.fork_rng():
        torch.manual_seed(sizes["seed"])
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


MAKERS: dict[str, Callable[[Mapping[str, Any], Path], None]] = {
    "easy-vqa": write_easy_vqa,
    "llava": join,
    "text": _text,
}
"""Name in a recipe -> writes the model's folder."""
