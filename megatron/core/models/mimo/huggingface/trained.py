# SPDX-License-Identifier: Apache-2.0
"""What of a folder's model trains under a recipe: weights by part, counted without making any."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.core.models.mimo.huggingface.build import BuildOptions, fake_parts, named_in
from megatron.core.models.mimo.huggingface.composites import describe
from megatron.core.models.mimo.huggingface.configuration import read_config
from megatron.core.models.mimo.huggingface.folder import ModelFolder
from megatron.core.models.mimo.huggingface.lora import attach
from megatron.core.models.mimo.job.built_model import LANGUAGE
from megatron.core.models.mimo.plan.shapes import ENCODER, PROJECTOR, Trained
from megatron.core.models.mimo.training.parameter_names import Named, freeze, select
from megatron.core.models.mimo.transformer.lora import is_adapters
from mimo_colocated.launch.lora import Lora


def trained_parts(
    folder: str | Path,
    frozen: Sequence[str],
    lora: Lora,
    groups: Sequence[Sequence[str]] = (),
) -> dict[str, Trained]:
    """Return ``language``, ``MODALITY.encoder`` and ``MODALITY.projector`` -> what of it trains.

    The names mean what they mean in training, by the same code, on a model without memory. One
    process calls it, as its default process group's only rank.

    Args:
        folder: a Hugging Face model folder; of its weights the headers are read.
        frozen: names of what does not train, or patterns.
        lora: adapters, which then train alone.
        groups: names of each parameter group, which must mean something: other learning rates, 0
            among them, have gradients and an optimizer as all do.

    Raises:
        ParameterNameError: a name of nothing, or nothing is left to train.
        UnsupportedModelError: a kind of model, a setting or an adapter that is not supported.
    """
    mode, path = FakeTensorMode(), Path(folder)
    names: Collection[str] = ()
    # A model that has not been made yet has the usual names.
    if any(path.glob("*.safetensors")):
        with ModelFolder(path) as opened:
            names = opened.tensors
    parts = fake_parts(describe(read_config(path)), names, BuildOptions(), mode)
    if lora.rank:
        with mode:
            attach(parts, lora, seed=0)
    modules = [(part.name, module) for part in parts for module in part.modules]
    every = named_in(modules, parts)
    freeze(frozen, every)
    for number, names in enumerate(groups):
        select(names, every, f"groups.{number}: ")
    found: dict[str, list[int]] = {}
    for each in every:
        own, trained, added = found.setdefault(_part(each), [0, 0, 0])
        size, trains = each.parameter.numel(), each.parameter.requires_grad
        if is_adapters(each.name):
            added += size * trains
        else:
            own, trained = own + size, trained + size * trains
        found[_part(each)] = [own, trained, added]
    return {
        name: Trained(trained / own if own else 0.0, float(added))
        for name, (own, trained, added) in found.items()
    }


def _part(each: Named) -> str:
    module, _, rest = each.own[1].partition(".")
    if module == LANGUAGE:
        return module
    part = PROJECTOR if rest.startswith(PROJECTOR) else ENCODER
    return f"{module}.{part}"
