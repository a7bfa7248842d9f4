# SPDX-License-Identifier: Apache-2.0
"""What this rank has of a model: one answer to "which modules?" for everything that runs them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.model.deepstack import DeepStack

if TYPE_CHECKING:
    pass

# The attributes of a model that hold its language model, and the further virtual stages of it.
LANGUAGE_MODEL, VIRTUAL_STAGES = "language_model", "virtual_stages"
_MODALITIES = "modality_submodules"


def _read(path: str, doc: str) -> Any:
    return property(attrgetter(f"_model.{path}"), doc=doc)


class RankModules:
    """A live, read-only view: wrappers take the modules' places after the model was built.

    Args:
        model: a ``MimoModel``, or what stands in for one.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    encoders = _read(_MODALITIES, "Modality -> its module on this rank, bare or wrapped.")
    language_model = _read(
        LANGUAGE_MODEL, "The first of :attr:`stages`; ``None`` on encoder ranks."
    )
    special_token_ids = _read("special_token_ids", "Modality -> the token of its rows.")
    bridges = _read("colocated_comms", '``(modality, "language")`` -> its bridge.')
    partition_adapter = _read(
        "partition_adapter", "What cuts, the user's own too; ``None`` without CP and SP."
    )

    @property
    def stages(self) -> list[nn.Module]:
        """The language model's stages on this rank, bare or wrapped, in order.

        One, or several virtual ones of an interleaved pipeline; none on encoder ranks.
        """
        first = getattr(self._model, LANGUAGE_MODEL, None)
        further = getattr(self._model, VIRTUAL_STAGES, None)
        # A mock answers to any name.
        further = further if isinstance(further, nn.ModuleList) else ()
        return [] if first is None else [first, *further]

    @property
    def active(self) -> list[Any]:
        """The language model's stages, then the modalities, as far as this rank has them."""
        encoders = getattr(self._model, _MODALITIES, {}).values()
        return [*self.stages, *(module for module in encoders if module is not None)]

    @property
    def language_config(self) -> Any:
        """The language model's transformer config."""
        return self._model.mimo_config.language_model_spec.params["config"]

    @cached_property
    def deepstack(self) -> DeepStack:
        """Which levels the rows of modalities have, and who adds them."""
        # What stands in for a model may have no configuration; stock reads none in a forward.
        options = getattr(self._model, "mimo_config", None)
        return DeepStack(0, {}, ()) if options is None else DeepStack.of(options)

    @property
    def language_grid(self) -> Any:
        """The language model's grid."""
        return self._model.mimo_config.module_to_grid_map[MIMO_LANGUAGE_MODULE_KEY]

    @property
    def language_stage(self) -> int:
        """The language model's pipeline rank here."""
        grid = (self._model.mimo_config.module_to_grid_map or {}).get(MIMO_LANGUAGE_MODULE_KEY)
        if grid is None or "pp" not in grid.dim_names:
            return 0
        return grid.coords(dist.get_rank())["pp"]

    def encoder(self, name: str) -> Any:
        """Return the module of a modality; ``None`` where there is none."""
        return dict(getattr(self._model, _MODALITIES, {})).get(name)

    def bridge(self, name: str) -> Any:
        """Return the bridge of a modality; ``None`` without one."""
        return self.bridges.get((name, MIMO_LANGUAGE_MODULE_KEY))

    def named(self) -> Iterator[tuple[str, nn.Module]]:
        """Return (path, module) of modalities, virtual stages and other children, in order."""
        for name, child in self._model.named_children():
            if name in (_MODALITIES, VIRTUAL_STAGES):
                yield from ((f"{name}.{key}", module) for key, module in child.named_children())
            else:
                yield name, child


def stages_of(model: Any) -> list[nn.Module]:
    """Return the language model's stages on this rank, in order; see ``RankModules.stages``."""
    return RankModules(model).stages
