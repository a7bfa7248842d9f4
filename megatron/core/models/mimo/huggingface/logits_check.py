# SPDX-License-Identifier: Apache-2.0
"""Whether a model's logits here, in any layout, are transformers' on the same inputs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.mimo.huggingface.all_ranks import on_all_ranks
from megatron.core.models.mimo.huggingface.build import ImportedModel
from megatron.core.models.mimo.huggingface.configuration import read_config
from megatron.core.models.mimo.huggingface.examples import Examples, Sample
from megatron.core.models.mimo.huggingface.folder import ModelFolder
from megatron.core.models.mimo.huggingface.weights import held_by
from megatron.core.models.mimo.job.built_model import LANGUAGE
from megatron.core.models.mimo.job.logits import gather
from megatron.core.models.mimo.job.trainer import Runner, TrainOptions
from megatron.core.models.mimo.training.agreement import gathered

CHANGE = 1e-3
"""What a control adds to a weight."""
TEXT = {"text": lambda _number: 0}
WITH_ITEMS = {
    **TEXT,
    "one each": lambda _number: 1,
    "several each": lambda number: 2 + number % 2,
    "some without": lambda number: number % 3,
}
"""Case -> from a sample's number to its images or sounds."""


@dataclass(frozen=True)
class Verdict:
    """How the logits of a case compare.

    Attributes:
        case: its name.
        error: largest difference over the largest logit.
        where: of the largest difference: sample, position, token.
    """

    case: str
    error: float
    where: tuple[int, ...]


class LogitsCheck:
    """Compares one model; every rank makes one and calls the same methods.

    Args:
        built: the model, from a folder that rank 0 gives transformers, too.
    """

    def __init__(self, built: ImportedModel) -> None:
        self._built, self._config = built, read_config(built.source)
        self._examples = on_all_ranks(
            lambda: Examples(built.source, self._config, built.composite), "make inputs"
        )
        parts = {name: groups.dp.size() for name, groups in built.collections.items()}
        self._batch = math.lcm(*parts.values())
        self._runner = Runner(built, TrainOptions(steps=1, global_batch_size=self._batch))
        self._theirs = on_all_ranks(self._transformers, "open the folder with transformers")
        built.model.eval()

    @property
    def source(self) -> str:
        """Where the inputs come from, in words."""
        return self._examples.source

    def cases(self) -> Iterator[Verdict]:
        """Yield the verdict of each case, the same on all ranks."""
        for case, items in (WITH_ITEMS if self._built.composite.encoders else TEXT).items():
            samples = [self._examples.sample(items(n), n) for n in range(self._batch)]
            yield self._compare(case, samples)

    def worst_weight(self) -> tuple[str, float]:
        """Return the folder's tensor that differs most from what the model holds, and by how much.

        Read again from the folder, relative to the tensor's largest element.
        """
        own = on_all_ranks(self._worst_of_this_rank, "read the folder again")
        return max(gathered(own), key=lambda found: found[1])

    def _worst_of_this_rank(self) -> tuple[str, float]:
        worst = ("", 0.0)
        with ModelFolder(self._built.source) as folder:
            for held in held_by(self._built.parts):
                for run in held.runs(folder.tensors):
                    name = held.source.names[run.source]
                    saved = folder.read(name, held.where(run, folder.tensors[name]))
                    own = held.view(run).cpu().float()
                    off = (own - saved.to(held.parameter.dtype).float()).abs().max()
                    off = torch.nan_to_num(off, nan=math.inf)
                    error = (off / saved.float().abs().max().clamp(min=1e-30)).item()
                    worst = max(worst, (name, error), key=lambda found: found[1])
        return worst

    def change_a_weight(self) -> str:
        """Add :data:`CHANGE` to the last norm's weight, and return its name: a control's error."""
        changed = ""
        with torch.no_grad():
            for held in held_by(self._built.parts):
                if held.name == f"{LANGUAGE}.decoder.final_layernorm.weight":
                    held.parameter.add_(CHANGE)
                    changed = held.source.names[0]
        return max(gathered(changed))

    def _transformers(self) -> Any:
        """Transformers' model, on the first rank."""
        if dist.get_rank() != 0:
            return None
        import transformers

        transformers.utils.logging.disable_progress_bar()
        usual = "AutoModelForImageTextToText"
        if not self._built.composite.encoders:
            usual = "AutoModelForCausalLM"
        named = (self._config.architectures or [usual])[0]
        kind = getattr(transformers, named, None) or getattr(transformers, usual)
        dtype = self._built.configs[LANGUAGE].params_dtype
        return kind.from_pretrained(self._built.source, dtype=dtype).eval()

    def _compare(self, case: str, samples: list[Sample]) -> Verdict:
        input_ids = self._padded(samples)
        ours = self._logits(input_ids, samples)

        def verdict() -> Verdict | None:
            if self._theirs is None:
                return None
            theirs = self._their_logits(input_ids, samples)
            difference = (ours[..., : theirs.shape[-1]].float().cpu() - theirs).abs()
            # A number that is none is the largest difference.
            difference = torch.nan_to_num(difference, nan=math.inf)
            where = torch.unravel_index(difference.argmax(), difference.shape)
            error = (difference.max() / theirs.abs().max()).item()
            return Verdict(case, error, tuple(int(n) for n in where))

        return gathered(on_all_ranks(verdict, "run transformers"))[0]

    def _padded(self, samples: list[Sample]) -> Tensor:
        """``(B, S)``; what follows a sample is compared as well: it sees the same on both sides."""
        groups, longest = self._runner.groups, max(len(sample.input_ids) for sample in samples)
        multiple = 2 * groups.cp.size() * groups.tp.size()
        length = -(-longest // multiple) * multiple
        rows = []
        for sample in samples:
            more = self._examples.padding(length - len(sample.input_ids))
            rows.append(torch.cat([sample.input_ids, more]))
        return torch.stack(rows)

    @torch.no_grad()
    def _their_logits(self, input_ids: Tensor, samples: list[Sample]) -> Tensor:
        own = {name: _as(value, self._theirs.dtype) for name, value in _joined(samples).items()}
        inputs = {**own, "attention_mask": torch.ones_like(input_ids)}
        if "mm_token_type_ids" in inspect.signature(self._theirs.forward).parameters:
            # Without it transformers counts images as text; processors return it.
            images = torch.zeros_like(input_ids, dtype=torch.int)
            for part in self._built.composite.encoders:
                images[input_ids == part.token_id] = 1
            inputs["mm_token_type_ids"] = images
        return self._theirs(input_ids=input_ids, **inputs, use_cache=False).logits.float()

    def _logits(self, input_ids: Tensor, samples: list[Sample]) -> Tensor:
        device, own = self._runner.device, self._samples_of(LANGUAGE)
        positions = self._positions(input_ids, samples)
        inputs = {
            "input_ids": input_ids[own].to(device),
            "position_ids": positions[..., own, :].to(device),
            "labels": None,
            "loss_mask": None,
            "modality_inputs": self._encoder_inputs(samples) or None,
        }
        vocabulary = self._built.composite.language
        padded = vocabulary.family.params(vocabulary.config)["vocab_size"]
        ids = input_ids[own]
        whole = self._runner.whole_logits(inputs, [ids.shape[1]] * len(ids), (*ids.shape, padded))
        return gather(whole, self._runner.groups.dp, dim=0)

    def _samples_of(self, module: str) -> slice:
        rank, size = self._runner.parts()[module]
        each = self._batch // size
        return slice(rank * each, (rank + 1) * each)

    def _encoder_inputs(self, samples: list[Sample]) -> dict[str, Any]:
        """Modality -> the inputs of this rank's samples; None without any."""
        found: dict[str, Any] = {}
        for part in self._built.composite.encoders:
            own = _joined(samples[self._samples_of(part.modality)])
            dtype = self._built.configs[part.modality].params_dtype
            moved = {n: _as(value, dtype).to(self._runner.device) for n, value in own.items()}
            found[part.modality] = {part.name: moved} if moved else None
        return found

    def _positions(self, input_ids: Tensor, samples: list[Sample]) -> Tensor:
        language = self._built.composite.language
        if language.family.params(language.config)["position_embedding_type"] != "mrope":
            return torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        from megatron.core.models.mimo.huggingface.positions import multimodal_positions

        grids = _joined(samples).get("image_grid_thw")
        return multimodal_positions(self._config, input_ids, grids)


def _joined(samples: list[Sample]) -> Mapping[str, Tensor]:
    """Encoder inputs of several samples, one after the other."""
    names = [name for sample in samples for name in sample.inputs]
    return {
        name: torch.cat([sample.inputs[name] for sample in samples if name in sample.inputs])
        for name in dict.fromkeys(names)
    }


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
