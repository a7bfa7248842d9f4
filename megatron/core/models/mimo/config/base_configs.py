# SPDX-License-Identifier: Apache-2.0
"""Configuration of a multimodal model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.comm.plan.balance import EncoderBalance
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.memory.policy import EncoderMemory
from megatron.core.transformer.spec_utils import ModuleSpec

KV_FORMATS = ("sbhd", "thd")
BRIDGES = ["gather", "routed"]
BRIDGE_GUARDS = ("always", "first", "off")


@dataclass
class MimoModelConfig:
    """What :class:`MimoModel` builds.

    Attributes:
        language_model_spec: the language model; ``params["config"]`` is its transformer config.
        virtual_stage_specs: with an interleaved pipeline, the language model's further parts on
            this rank: ``language_model_spec`` is its first virtual stage, these are the next ones.
        modality_submodules_spec: modality name -> spec of its ``ModalitySubmodules``.
        special_token_ids: modality name -> the id that stands in ``input_ids`` for one row
            (one embedding) of that modality, e.g. ``{"images": 32000}``.
        module_to_grid_map: one ``HyperCommGrid`` per modality name plus one for ``"language"``.
            All grids over the same ranks: colocated. Disjoint grids: every rank runs either
            encoders or the language model. ``None``: everything on every rank, with Megatron's
            global ``parallel_state``.
        kv_format: ``"sbhd"`` (dense) or ``"thd"`` (packed sequences).
        bridge: how rows of colocated encoders reach the language model, for all modalities or by
            modality (``{"images": "gather", "sounds": "routed"}``). ``"routed"``: each row
            goes to the ranks that own its position; any DP sizes, any number of rows.
            ``"gather"``, the reference: every rank of a language replica gets all of them and
            cuts the fused sequence; DP sizes that divide, equally many rows per replica.
        bridge_guard: for ``"routed"``: when the ranks of an exchange group compare their plans,
            ``"always"``, before the ``"first"`` exchange only, or ``"off"``. Plans given for all
            modalities (``route_plan``) are compared in the background, see ``docs/bridge.md``.
        encoder_balance: for ``"routed"``: modality -> when and how its items (images) are spread
            over the encoder replicas of an exchange group by cost. A modality whose routes are
            planned ahead is left alone: there the loader does it, with ``plan_balance``.
        encoder_memory: modality -> what becomes of its activations between its forward and its
            backward pass; those of other modalities stay on the device.
        deepstack_layers: modality -> the language model's layers (counted from 0 over all stages)
            after which one more level of its rows is added, as in DeepStack (Qwen3-VL:
            ``{"images": (0, 1, 2)}``). With ``L`` of them its encoders bring rows of width
            ``(1 + L) * hidden_size``: what stands among the text, then the levels.

    Raises:
        ValueError: the grid map's keys are not the modality names plus ``"language"``, a modality
            is called ``"language"`` or ``"text"``, or ``kv_format``,
            ``bridge`` or ``bridge_guard`` is unknown; ``encoder_balance`` for an unknown modality
            or without the routed bridge; ``encoder_memory`` for an unknown modality.
    """

    language_model_spec: ModuleSpec
    modality_submodules_spec: dict[str, ModuleSpec] = field(default_factory=dict)
    special_token_ids: dict[str, int] = field(default_factory=dict)
    module_to_grid_map: dict[str, HyperCommGrid] | None = None
    kv_format: str = "sbhd"
    bridge: str | Mapping[str, str] = "routed"
    bridge_guard: str = "always"
    encoder_balance: dict[str, EncoderBalance] = field(default_factory=dict)
    encoder_memory: dict[str, EncoderMemory] = field(default_factory=dict)
    virtual_stage_specs: list[ModuleSpec] = field(default_factory=list)
    deepstack_layers: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_names()
        if self.kv_format not in KV_FORMATS:
            raise ValueError(f"kv_format must be one of {KV_FORMATS}, got {self.kv_format!r}")
        self._check_bridges()
        if self.bridge_guard not in BRIDGE_GUARDS:
            raise ValueError(
                f"bridge_guard must be one of {BRIDGE_GUARDS}, got {self.bridge_guard!r}"
            )
        routed = self._routed()
        if self.bridge_guard != "always" and not routed:
            raise ValueError(
                f"bridge_guard={self.bridge_guard!r} is for bridge='routed', got {self.bridge!r}; "
                "leave it out"
            )
        unknown = set(self.encoder_balance) - set(self.modality_submodules_spec)
        if unknown or set(self.encoder_balance) - routed:
            raise ValueError(
                f"encoder_balance is for {sorted(self.encoder_balance)}; it needs bridge='routed' "
                f"(got {self.bridge!r}) and modalities of the model, which are "
                f"{sorted(self.modality_submodules_spec)}"
            )
        unknown = set(self.encoder_memory) - set(self.modality_submodules_spec)
        if unknown:
            raise ValueError(
                f"encoder_memory is for {sorted(unknown)}, but the model's modalities are "
                f"{sorted(self.modality_submodules_spec)}"
            )
        if self.module_to_grid_map:
            self._check_grid_keys(set(self.module_to_grid_map))

    def _check_bridges(self) -> None:
        given = self.bridge if isinstance(self.bridge, Mapping) else {"": self.bridge}
        for bridge in given.values():
            if bridge not in BRIDGES:
                raise ValueError(f"bridge must be one of {tuple(BRIDGES)}, got {bridge!r}")
        if given is self.bridge and set(given) != set(self.modality_submodules_spec):
            raise ValueError(
                f"bridge is given for {sorted(given)}, but the model's modalities are "
                f"{sorted(self.modality_submodules_spec)}; name a bridge for each of them, or one "
                "for all"
            )

    def _routed(self) -> set[str]:
        names = self.modality_submodules_spec
        return {name for name in names if bridge_of(self, name) == "routed"}

    def _check_names(self) -> None:
        reserved = {MIMO_LANGUAGE_MODULE_KEY, "text"} & set(self.modality_submodules_spec)
        if reserved:
            raise ValueError(
                f"{sorted(reserved)} cannot be a modality name: 'text' and "
                f"'{MIMO_LANGUAGE_MODULE_KEY}' stand for the language side; rename the modality"
            )

    def _check_grid_keys(self, grid_keys: set[str]) -> None:
        expected = set(self.modality_submodules_spec) | {MIMO_LANGUAGE_MODULE_KEY}
        if grid_keys != expected:
            raise ValueError(
                "module_to_grid_map keys must match the modality names + "
                f"'{MIMO_LANGUAGE_MODULE_KEY}'. Missing: {sorted(expected - grid_keys)}, "
                f"extra: {sorted(grid_keys - expected)}"
            )


def register_bridge(name: str) -> None:
    """Let ``MimoModelConfig.bridge`` name one more kind of bridge.

    Raises:
        ValueError: the name is taken.
    """
    if name in BRIDGES:
        raise ValueError(f"a bridge is called {name!r} already; the names are {BRIDGES}")
    BRIDGES.append(name)


def bridge_of(config: Any, modality: str) -> str:
    """Return the name of a modality's bridge."""
    bridge = option_of(config, "bridge")
    return bridge[modality] if isinstance(bridge, Mapping) else bridge


def option_of(config: Any, name: str) -> Any:
    """Return an option that stock's config does not have; a stand-in for one gets its default."""
    if isinstance(config, MimoModelConfig):
        return getattr(config, name)
    (option,) = (each for each in fields(MimoModelConfig) if each.name == name)
    factory = option.default_factory
    default = option.default if factory is MISSING else factory()
    value = getattr(config, name, default)
    # A mock answers to any name.
    return value if isinstance(value, type(default)) else default
