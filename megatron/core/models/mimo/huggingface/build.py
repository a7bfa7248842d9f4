# SPDX-License-Identifier: Apache-2.0
"""From a Hugging Face folder to a model in any layouts, weights loaded.

built = from_folder("llava-1.5-7b", {"images": Layout(tp=2, dp=4), "language": Layout(...)})
...                                    # train it
to_folder(built, "my-llava")
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.config.base_configs import MimoModelConfig
from megatron.core.models.mimo.gradients.finalize import iter_modules
from megatron.core.models.mimo.huggingface.all_ranks import on_all_ranks
from megatron.core.models.mimo.huggingface.composites import Composite, EncoderPart, describe
from megatron.core.models.mimo.huggingface.configuration import changed, read_config
from megatron.core.models.mimo.huggingface.cuts import Heads
from megatron.core.models.mimo.huggingface.earlier_run import EarlierRun
from megatron.core.models.mimo.huggingface.family import Family, UnsupportedModelError
from megatron.core.models.mimo.huggingface.fits import check_fits
from megatron.core.models.mimo.huggingface.folder import ModelFolder, OpenFolder
from megatron.core.models.mimo.huggingface.joined_folder import Folders
from megatron.core.models.mimo.huggingface.language_model import ImportedGPTModel
from megatron.core.models.mimo.huggingface.lora import Adapted, attach
from megatron.core.models.mimo.huggingface.tables import best_spelled
from megatron.core.models.mimo.huggingface.torch_native import (
    encoder_spec,
    encoder_table,
    language_table,
    native_language_spec,
    with_native_parts,
)
from megatron.core.models.mimo.huggingface.weights import Part, bare, check, held_by, load
from megatron.core.models.mimo.job.built_model import LANGUAGE, BuiltModel, finish_model
from megatron.core.models.mimo.job.settings import (
    any_module_settings,
    language_specs,
    module_grid,
    stage_settings,
)
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.randomness import seed_everything
from megatron.core.models.mimo.training.groups import create_process_groups
from megatron.core.models.mimo.training.parameter_names import Named, named_parameters
from megatron.core.models.mimo.training.parameter_names import freeze as freeze_parameters
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from mimo_colocated.launch.layouts import Layout
from mimo_colocated.launch.lora import Lora


@dataclass(frozen=True)
class BuildOptions:
    """How a model is built, apart from its weights and its layouts.

    Attributes:
        dtype: of weights and activations; gradients are summed in fp32.
        sequence_parallel: the language model, and encoders that can, also cut their sequence
            over TP.
        bridge: ``"routed"`` or ``"gather"``.
        packed: the language model takes packed sequences.
        virtual_stages: stages per rank of a pipelined language model.
        lengths_differ: microbatches of a step need not have one length, which pipeline stages then
            tell one another.
        recompute: ``"none"``, ``"selective"`` or ``"full"``, in all modules. Of transformers' own
            there is no selective: torch-native ones refuse it, whole towers of one's own keep what
            they compute.
        seed: of weights that no folder has, and of dropout.
        freeze: stops the training of parts before gradient buffers are made; called with the
            ``MimoModel``.
        freeze_names: parameters that do not train, by names of the model's modules, of their
            parameters or of the folder's tensors, or patterns: :mod:`.training.parameter_names`.
        torch_native: modules of transformers' own classes, sharded by PyTorch (DTensor, FSDP2)
            in place of Megatron's layers: ``"language"``, modalities; see docs/torch-native.md.
        lora: adapters of linear layers, which then train alone; see :mod:`.lora`.
        weights: of an earlier run, in place of the folder's.
        ddp: of every module.
        backend: of the process groups, PyTorch's default one if None.
        config_fields: of the whole model's ``config.json``, to use other values than it has, such
            as ``{"vision_feature_layer": -1}``.
    """

    dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    bridge: str = "routed"
    packed: bool = False
    virtual_stages: int = 1
    lengths_differ: bool = False
    recompute: str = "none"
    seed: int = 1234
    freeze: Callable[[MimoModel], None] = lambda _model: None
    freeze_names: Sequence[str] = ()
    lora: Lora | None = None
    weights: EarlierRun | None = None
    ddp: DistributedDataParallelConfig = field(
        default_factory=lambda: DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, check_for_nan_in_grad=False
        )
    )
    torch_native: Collection[str] = ()
    backend: str | None = None
    config_fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class ImportedModel(BuiltModel):
    """A built model that knows where its weights come from and what they are called there.

    Attributes:
        composite: what it is made of.
        parts: its modules with their tables, in the folder's spelling.
        source: the folder, or the folders that it was put together from.
        config_fields: that have other values than in the source's configuration.
        torch_native: names of its torch-native modules, sorted.
        lora: settings of its adapters, None without any.
        adapted: this rank's adapters.
    """

    composite: Composite
    parts: tuple[Part, ...]
    source: Path | Folders
    config_fields: Mapping[str, Any]
    torch_native: tuple[str, ...]
    lora: Lora | None
    adapted: list[Adapted]

    def named_parameters(self) -> list[Named]:
        """Return this rank's parameters with their names, those of the folder's tensors too."""
        return named(self.model, self.parts)


def named(model: MimoModel, parts: Iterable[Part]) -> list[Named]:
    """Return this rank's parameters with their names here and in the folder.

    Args:
        model: bare or wrapped.
        parts: its modules with their tables.
    """
    return named_in(iter_modules(model), parts)


def named_in(modules: Iterable[tuple[str, torch.nn.Module]], parts: Iterable[Part]) -> list[Named]:
    """Return parameters of modules with their names here and in the folder.

    Args:
        modules: (name, module).
        parts: their tables.
    """
    tables = {part.name: part.table for part in parts}

    def tensors(module: str, name: str) -> tuple[str, ...]:
        try:
            found = tables[module].find(name) if module in tables else None
        except UnsupportedModelError:  # of a tower that is brought as it is: no tensor of a folder
            return ()
        return found.names if found else ()

    return named_parameters(modules, tensors)


def from_folder(
    folder: str | Path,
    layouts: Mapping[str, Layout],
    options: BuildOptions | None = None,
    *,
    encoders: Sequence[EncoderPart] = (),
    load_weights: bool = True,
    tick: Callable[[int], None] = lambda _size: None,
) -> ImportedModel:
    """Build a model in a pair of layouts and load its weights; every rank calls it together.

    Args:
        folder: with ``config.json`` and safetensors; every rank must see it.
        layouts: module -> layout: ``"language"`` and every modality of the model; with ``cp``
            of a modality whose tower cuts its items (CLIP, SigLIP, SigLIP2).
        options: how it is built.
        encoders: further ones that the folder knows nothing of; see :mod:`.own_encoders`.
        load_weights: False leaves them as drawn, for a training checkpoint that is loaded next.
        tick: told the bytes of every parameter that was loaded.

    Raises:
        FolderError: the folder is no whole model, or of another one than its configuration says.
        UnsupportedModelError: a kind of model or a setting that is not supported.
        ValueError: layouts that do not fit the model.
    """
    options = options or BuildOptions()
    opened, own = on_all_ranks(lambda: _opened(folder, options), f"open {folder}")
    with opened:
        composite = replace(own, encoders=(*own.encoders, *encoders))
        return import_from(
            opened, composite, layouts, options, load_weights=load_weights, tick=tick
        )


def _opened(folder: str | Path, options: BuildOptions) -> tuple[ModelFolder, Composite]:
    opened = ModelFolder(folder)
    return opened, describe(changed(read_config(opened.path), options.config_fields))


def import_from(
    opened: OpenFolder,
    composite: Composite,
    layouts: Mapping[str, Layout],
    options: BuildOptions,
    *,
    load_weights: bool,
    tick: Callable[[int], None],
) -> ImportedModel:
    """Build a model and load its weights; arguments as of :func:`from_folder`.

    Args:
        opened: where its weights are.
        composite: what it is made of.
        layouts, options, load_weights, tick: as there.
    """
    composite = with_native_parts(composite, options.torch_native, options.recompute)
    check_fits(
        composite,
        layouts,
        sequence_parallel=options.sequence_parallel,
        virtual_stages=options.virtual_stages,
        torch_native=options.torch_native,
    )
    built, parts = _build(composite, layouts, options)
    spelled = tuple(_spelled(part, composite, opened.tensors) for part in parts)

    adapted: list[Adapted] = []
    lora = options.lora if options.lora and options.lora.rank else None
    # Adapters come after the weights, and before gradient buffers.
    before = options.weights is not None and (lora or options.weights.lora)

    def fill(model: MimoModel) -> None:
        held = on_all_ranks(lambda: list(held_by(spelled)), "name its parameters")
        if before:
            options.weights.load(model, spelled)
        elif load_weights and options.weights is None:
            check(held, spelled, opened, headers_only=False)
            load(held, opened, tick)

    def freeze(model: MimoModel) -> None:
        if lora:
            adapted.extend(attach(spelled, lora, options.seed))
        options.freeze(model)
        freeze_parameters(options.freeze_names, named(model, spelled))

    finished = built(fill, freeze)
    if options.weights is not None and not before:
        options.weights.load(finished.model, spelled)
    own = {each.name: getattr(finished, each.name) for each in fields(BuiltModel)}
    # What was drawn is now as good as what was loaded.
    known = tuple(replace(part, drawn=()) for part in spelled)
    return ImportedModel(
        **own,
        composite=composite,
        parts=known,
        source=opened.source,
        config_fields=dict(options.config_fields),
        torch_native=tuple(sorted(options.torch_native)),
        lora=lora,
        adapted=adapted,
    )


def check_headers(folder: str | Path) -> None:
    """Compare the tensors that a folder's files name with the model; no weight is read or made.

    One process calls it, as its default process group's only rank.

    Args:
        folder: a Hugging Face model folder.

    Raises:
        FolderError: tensors are missing, left over or of another shape.
        UnsupportedModelError: a kind of model or a setting that is not supported.
    """
    options = BuildOptions(dtype=torch.get_default_dtype())
    opened, composite = _opened(folder, options)
    with opened:
        spelled = fake_parts(composite, opened.tensors, options, FakeTensorMode())
        check(list(held_by(spelled)), spelled, opened, headers_only=True)


def fake_parts(
    composite: Composite, names: Collection[str], options: BuildOptions, mode: FakeTensorMode
) -> list[Part]:
    """Return a model's modules, whose parameters take no memory, with their tables.

    One process calls it, as its default process group's only rank.

    Args:
        composite: what it is made of.
        names: of a folder's tensors, in whose spelling the tables are.
        options: how it is built.
        mode: in which its parameters are made.

    Raises:
        UnsupportedModelError: a setting that is not supported.
    """
    composite = with_native_parts(composite, options.torch_native, options.recompute)
    modules = (LANGUAGE, *(part.modality for part in composite.encoders))
    _finish, parts = _build(composite, dict.fromkeys(modules, Layout()), options, mode)
    return [_spelled(part, composite, names) for part in parts]


def module_config(
    family: Family, config: Any, layout: Layout, options: BuildOptions, **more: Any
) -> TransformerConfig:
    """Return the ``TransformerConfig`` of a module.

    Args:
        family: that reads the configuration.
        config: transformers' configuration of the module.
        layout: of the module.
        options: dtype and recomputation.
        **more: further fields.
    """
    family.check(config)
    return TransformerConfig(
        **{
            **any_module_settings(layout, options.dtype, options.recompute),
            # Weights come from the folder, and others from their names and the seed.
            "perform_initialization": False,
            **family.settings(config),
            **more,
        }
    )


def _language_config(
    composite: Composite, layout: Layout, options: BuildOptions
) -> TransformerConfig:
    part = composite.language
    # A torch-native model takes whole sequences and cuts them over TP itself.
    cut = options.sequence_parallel and LANGUAGE not in options.torch_native
    differ = options.lengths_differ
    more = stage_settings(layout, options.virtual_stages, cut, lengths_differ=differ)
    if part.family.settings(part.config).get("num_moe_experts"):
        more |= {
            "expert_model_parallel_size": layout.ep,
            "expert_tensor_parallel_size": layout.expert_tp,
        }
    sections = part.family.params(part.config).get("rotary")
    if sections is not None and sections.sections is not None:
        more["mrope_section"] = list(sections.sections)
    return module_config(part.family, part.config, layout, options, **more)


def _build(
    composite: Composite,
    layouts: Mapping[str, Layout],
    options: BuildOptions,
    making: AbstractContextManager | None = None,
) -> tuple[Callable[..., BuiltModel], list[Part]]:
    """The model, bare, as a function that fills, freezes and wraps it; and its parts.

    Its modules are made within ``making``, if it is given.
    """
    configs = {LANGUAGE: _language_config(composite, layouts[LANGUAGE], options)}
    for part in composite.encoders:
        at = layouts[part.modality]
        cut = options.sequence_parallel and part.sequence_parallel and at.tp > 1
        configs[part.modality] = module_config(
            part.family,
            part.config,
            at,
            options,
            sequence_parallel=cut,
            context_parallel_size=at.cp,
        )
    experts = configs[LANGUAGE].num_moe_experts
    grids = {
        name: module_grid(
            name, at, bridge=options.bridge, experts=bool(experts), backend=options.backend
        )
        for name, at in layouts.items()
    }
    collections = {name: create_process_groups(grid) for name, grid in grids.items()}
    seed_everything(options.seed)

    def encoders() -> dict[str, ModuleSpec]:
        return {
            part.modality: encoder_spec(
                part, configs, collections[part.modality], grids[part.modality]
            )
            for part in composite.encoders
        }

    first, *others = _language_specs(composite, configs[LANGUAGE], grids, collections, options)
    mimo_config = MimoModelConfig(
        language_model_spec=first,
        virtual_stage_specs=others,
        modality_submodules_spec=on_all_ranks(encoders, "make the encoders"),
        special_token_ids={part.modality: part.token_id for part in composite.encoders},
        module_to_grid_map=grids,
        bridge=options.bridge,
        kv_format="thd" if options.packed else "sbhd",
        deepstack_layers={
            part.modality: part.level_layers for part in composite.encoders if part.level_layers
        },
    )
    with making or nullcontext():
        model = MimoModel(
            mimo_config, cp_group=collections[LANGUAGE].cp, tp_group=collections[LANGUAGE].tp
        )
    _mark_what_is_cut(model)
    parts = [_language_part(composite, model, collections[LANGUAGE], configs[LANGUAGE])]
    parts += [
        _encoder_part(part, model, collections[part.modality], configs[part.modality])
        for part in composite.encoders
    ]

    def finish(
        fill: Callable[[MimoModel], None], freeze: Callable[[MimoModel], None]
    ) -> BuiltModel:
        if torch.cuda.is_available():
            model.to(torch.device(torch.cuda.current_device()))
        fill(model)
        return finish_model(
            model,
            grids,
            collections,
            configs,
            options.ddp,
            seed=options.seed,
            freeze=freeze,
        )

    return finish, parts


def _language_specs(
    composite: Composite,
    config: TransformerConfig,
    grids: Mapping[str, HyperCommGrid],
    collections: Mapping[str, ProcessGroupCollection],
    options: BuildOptions,
) -> list[ModuleSpec]:
    part, groups = composite.language, collections[LANGUAGE]
    if LANGUAGE in options.torch_native:
        halved = options.dtype is not torch.float32
        return [
            native_language_spec(
                part.config,
                config,
                grids[LANGUAGE],
                pg_collection=groups,
                precision=options.dtype if halved else None,
                sequence_parallel=options.sequence_parallel,
                activation_checkpointing=options.recompute == "full",
            )
        ]
    return language_specs(ImportedGPTModel, config, groups, **part.family.params(part.config))


def _mark_what_is_cut(model: torch.nn.Module) -> None:
    """Say which weights are cut over TP; Megatron-Core 0.16 says it only of what it draws."""
    dims = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
    for module in model.modules():
        dim = next((at for kind, at in dims.items() if isinstance(module, kind)), None)
        weight = None if dim is None else module.weight
        if weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, dim, 1)


def _heads(config: TransformerConfig) -> Heads:
    groups = config.num_query_groups or config.num_attention_heads
    return Heads(config.num_attention_heads, groups, config.kv_channels)


def _language_part(
    composite: Composite,
    model: MimoModel,
    groups: ProcessGroupCollection,
    config: TransformerConfig,
) -> Part:
    part = composite.language
    modules = bare(module for name, module in iter_modules(model) if name == LANGUAGE)
    table = language_table(part, modules) + composite.unused
    return Part(LANGUAGE, modules, table, groups, _heads(config))


def _encoder_part(
    part: EncoderPart,
    model: MimoModel,
    groups: ProcessGroupCollection,
    config: TransformerConfig,
) -> Part:
    modules = bare([model.modality_submodules[part.modality]])
    table = encoder_table(part, modules)
    return Part(part.modality, modules, table, groups, _heads(config), part.drawn)


def _spelled(part: Part, composite: Composite, names: Collection[str]) -> Part:
    own = next((e for e in composite.encoders if e.modality == part.name), composite.language)
    table = best_spelled(part.table, own.spellings, names)
    return replace(part, table=table)
