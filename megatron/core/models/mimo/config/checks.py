# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a configuration, said when the model is built; stand-ins of values pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.models.mimo.config.base_configs import MimoModelConfig, bridge_of, option_of
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

_NO_IDS = (bool, float, str, bytes, list, tuple, type(None))


def check_model_config(config: MimoModelConfig) -> None:
    """Refuse a configuration that cannot train as it says; all ranks refuse alike.

    Raises:
        TypeError: a spec that is none.
        ValueError: special tokens that are no ids, shared, or misnamed; multi-token prediction;
            levels of rows for layers that do not exist, or not in ascending order; CP of an
            encoder over a gather bridge, with balanced encoders, or on ranks of its own; what waits
            for ranks outside the module's own groups (fp8 scales over steps, attention over
            two levels of CP groups, fused operations), or CUDA graphs.

    Warns:
        UserWarning: an id without a modality, or outside the vocabulary. Stock takes both and
            code written for it has both: placeholders that no tokenizer knows (-200, say) are
            never embedded. Tokens of the former in a batch are an error.
    """
    modalities = dict(config.modality_submodules_spec)
    for name, spec in modalities.items():
        if spec is None or isinstance(spec, (str, int, float, type)):
            raise TypeError(
                f"modality_submodules_spec['{name}'] must be a ModuleSpec, got {spec!r}"
            )
    token_ids = dict(config.special_token_ids or {})
    _check_ids(token_ids)
    _check_names(token_ids, modalities)
    _warn_outside(token_ids, _params(config.language_model_spec).get("vocab_size"))
    for spec in (config.language_model_spec, *option_of(config, "virtual_stage_specs")):
        _refuse_token_prediction(spec)
    _check_encoder_cp(config, modalities)
    _check_levels(option_of(config, "deepstack_layers"), modalities, config.language_model_spec)
    language = (config.language_model_spec, *option_of(config, "virtual_stage_specs"))
    for where, spec in (("the language model", language), *modalities.items()):
        for found in _configs(spec):
            _refuse_other_groups(where, found)
            _refuse_cuda_graphs(where, found)


def _check_ids(token_ids: Mapping[str, Any]) -> None:
    for name, token_id in token_ids.items():
        if isinstance(token_id, _NO_IDS):
            raise ValueError(
                f"special_token_ids['{name}'] must be a whole number, got {token_id!r}; give the "
                "id that stands in input_ids for one row of that modality"
            )
    names = list(token_ids)
    for name in names:
        others = [other for other in names if token_ids[other] == token_ids[name]]
        if len(others) > 1:
            raise ValueError(
                f"special_token_ids gives {others} the same id {token_ids[name]}, so their rows "
                "would go to the same places; give each modality an id of its own"
            )


def _check_names(token_ids: Mapping[str, Any], modalities: Mapping[str, Any]) -> None:
    unknown, without = sorted(set(token_ids) - set(modalities)), set(modalities) - set(token_ids)
    if unknown and without:
        raise ValueError(
            f"special_token_ids names {unknown}, which the model does not have, and misses "
            f"{sorted(without)}; its keys are the names in modality_submodules_spec"
        )
    if unknown:
        warnings.warn(
            f"special_token_ids names {unknown}, but the model's modalities are "
            f"{sorted(modalities)}; a batch with such tokens is an error",
            stacklevel=4,
        )


def _warn_outside(token_ids: Mapping[str, Any], vocabulary: Any) -> None:
    if type(vocabulary) is not int:
        return
    outside = {
        name: token_id
        for name, token_id in token_ids.items()
        if type(token_id) is int and not 0 <= token_id < vocabulary
    }
    if outside:
        warnings.warn(
            f"special_token_ids {outside} are outside the vocabulary of {vocabulary} ids (0 to "
            f"{vocabulary - 1}): the rows are placed all the same, but labels must not hold them "
            "where the loss mask counts",
            stacklevel=4,
        )


def _check_encoder_cp(config: MimoModelConfig, modalities: Mapping[str, Any]) -> None:
    """Refuse CP in an encoder's grid where its parts of items have no way to the language model."""
    grids = getattr(config, "module_to_grid_map", None) or {}
    for name in modalities:
        grid: Any = grids.get(name)
        other: Any = grids.get(MIMO_LANGUAGE_MODULE_KEY)
        names, shape = getattr(grid, "dim_names", ()), getattr(grid, "shape", ())
        sizes: dict[str, int] = dict(zip(names, shape, strict=False))
        cp = sizes.get("cp", 1)
        if cp == 1:
            continue
        needs = {
            "bridge='routed'": bridge_of(config, name) == "routed",
            "no encoder_balance": name not in option_of(config, "encoder_balance"),
            "the language model's ranks": (grid.rank_offset, grid.size)
            == (other.rank_offset, other.size),
        }
        wrong = [what for what, there in needs.items() if not there]
        if wrong:
            raise ValueError(
                f"Modality '{name}' has cp={cp} in its grid: its CP ranks hold a part of each "
                f"item, which needs {wrong[0]} (bridge={bridge_of(config, name)!r}); change that, "
                "or give those ranks to dp or tp"
            )


def _check_levels(
    levels: Mapping[str, Any], modalities: Mapping[str, Any], language: ModuleSpec
) -> None:
    unknown = sorted(set(levels) - set(modalities))
    if unknown:
        raise ValueError(
            f"deepstack_layers names {unknown}, but the model's modalities are "
            f"{sorted(modalities)}; leave out what the model does not have"
        )
    found = getattr(_params(language).get("config"), "num_layers", None)
    count = found if type(found) is int else None  # A stand-in does not say.
    for name, layers in levels.items():
        numbers = list(layers) if isinstance(layers, (list, tuple)) else None
        if not numbers or any(type(each) is not int for each in numbers):
            raise ValueError(
                f"deepstack_layers['{name}'] must be layer numbers, one per level, got {layers!r}; "
                "leave the modality out if its rows have no levels"
            )
        if numbers != sorted(set(numbers)):
            raise ValueError(
                f"deepstack_layers['{name}'] must be ascending and name each layer once, got "
                f"{layers!r}; sort the levels of the encoder's rows alike"
            )
        if count is not None and not 0 <= numbers[0] <= numbers[-1] < count:
            raise ValueError(
                f"deepstack_layers['{name}'] is {layers!r}, but the language model has {count} "
                f"layers, 0 to {count - 1}; name layers that exist"
            )


def _refuse_token_prediction(spec: ModuleSpec) -> None:
    params = _params(spec)
    layers = getattr(params.get("config"), "mtp_num_layers", None)
    if (type(layers) is int and layers > 0) or params.get("mtp_block_spec") is not None:
        raise ValueError(
            f"Multi-token prediction (mtp_num_layers={layers}) embeds the tokens to come by the "
            "language model's own embedding, which has none for rows of a modality; set "
            "mtp_num_layers=None and leave mtp_block_spec out"
        )


def _configs(spec: Any) -> Iterator[TransformerConfig]:
    """The layer configs that stand anywhere in a spec."""
    if isinstance(spec, TransformerConfig):
        yield spec
    elif isinstance(spec, ModuleSpec):
        yield from _configs((spec.params, spec.submodules))
    elif isinstance(spec, Mapping):
        yield from _configs(tuple(spec.values()))
    elif isinstance(spec, (list, tuple)):
        for each in spec:
            yield from _configs(each)


def _refuse_other_groups(where: str, config: TransformerConfig) -> None:
    """Refuse what Transformer Engine or stock does over groups that are not the module's.

    Such a collective meets ranks that run another module at that time, or none: it never ends.
    """
    if config.fp8 and config.fp8_recipe == "delayed":
        raise ValueError(
            f"The config of {where} asks for fp8={config.fp8!r} with fp8_recipe='delayed', whose "
            "scales are summed over all ranks of the job each time the module has run, and not "
            "all of them run it at the same time; set fp8_recipe to 'tensorwise', 'blockwise' or "
            "'mxfp8', whose scales need no other module's ranks"
        )
    kinds = config.cp_comm_type
    if "a2a+p2p" in (kinds if isinstance(kinds, (list, tuple)) else [kinds]):
        raise ValueError(
            f"The config of {where} asks for cp_comm_type='a2a+p2p', whose two levels of groups "
            "exist for one layout of all modules only; set it to 'p2p', 'all_gather' or 'a2a'"
        )
    if getattr(config, "use_transformer_engine_op_fuser", False):
        raise ValueError(
            f"The config of {where} sets use_transformer_engine_op_fuser, which asks for the TP "
            "size of one layout of all modules; leave it False"
        )


def _refuse_cuda_graphs(where: str, config: TransformerConfig) -> None:
    """Refuse graphs: a replay moves one batch's rows for ever, from host memory that is freed."""
    asked = [
        f"{name}={value!r}"
        for name in ("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph")
        if (value := getattr(config, name, None)) not in (None, False, "none")
    ]
    if asked:
        raise ValueError(
            f"The config of {where} asks for CUDA graphs ({', '.join(asked)}), which cannot "
            "replay an exchange whose sizes differ between batches, nor the random numbers of "
            "each module; set cuda_graph_impl='none'"
        )


def _params(spec: ModuleSpec) -> Mapping[str, Any]:
    return spec.params if isinstance(spec.params, Mapping) else {}
