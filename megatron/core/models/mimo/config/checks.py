# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a configuration, said when the model is built; stand-ins of values pass."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from megatron.core.models.mimo.config.base_configs import MimoModelConfig, option_of
from megatron.core.transformer.spec_utils import ModuleSpec

_NO_IDS = (bool, float, str, bytes, list, tuple, type(None))


def check_model_config(config: MimoModelConfig) -> None:
    """Refuse a configuration that cannot train as it says; all ranks refuse alike.

    Raises:
        TypeError: a spec that is none.
        ValueError: special tokens that are no ids, shared, or misnamed; multi-token prediction;
            levels of rows for layers that do not exist, or not in ascending order.

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
    _check_levels(option_of(config, "deepstack_layers"), modalities, config.language_model_spec)


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


def _params(spec: ModuleSpec) -> Mapping[str, Any]:
    return spec.params if isinstance(spec.params, Mapping) else {}
