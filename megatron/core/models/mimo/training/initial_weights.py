# SPDX-License-Identifier: Apache-2.0
"""Initial weights that do not depend on the layout.

``initialize_weights(module, seed)`` refills a built model. Two policies:

``"global"`` (default)
    A weight is a function of (seed, its global name). The whole tensor is drawn and each TP rank
    keeps its part, so TP, PP, DP, CP and EP make no difference: models in two layouts are the
    same function, and a parity test needs no weight copying.
``"per_shard"``
    For weights too large to draw whole. Each TP rank draws its own shard from
    :func:`per_shard_seed`. **This ties the initial weights to the TP size**; PP, DP, CP and EP
    still make no difference.

Global names are those of :mod:`.global_names`. An output layer that shares its weight with the
word embeddings of another pipeline stage takes their name.

What a weight is filled with is what stock's constructor would have drawn from: the config's
``init_method`` (column-parallel layers, routers and bare matrices), ``output_layer_init_method``
(row-parallel layers), ``embedding_init_method`` (embeddings); biases of parallel layers are zero;
modules of other packages use their own ``reset_parameters``. Draws are fp32 and cast afterwards,
so precision makes no difference either. CPU and GPU generators give different numbers.

Call it before an optimizer copies the weights. Pretrained weights that are loaded before stay, if
they are known to be (:mod:`.pretrained`); others are loaded afterwards.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from megatron.core.models.common.embeddings.language_model_embedding import (
    LanguageModelEmbedding,
)
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.mimo.randomness import derive_seed
from megatron.core.models.mimo.torch_native.part import TorchNativePart
from megatron.core.models.mimo.training.global_names import global_modules, join
from megatron.core.models.mimo.training.pretrained import kept_parameters, say_what_is_kept
from megatron.core.models.mimo.wrappers import unwrapped
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.router import Router

Policy = Literal["global", "per_shard"]
InitMethod = Callable[[Tensor], Any]

# module_id of per_shard_seed: the sharded weights of a transformer layer, in order of use.
PER_SHARD_MODULE_IDS = {
    "self_attention.linear_qkv": 0,
    "self_attention.linear_proj": 1,
    "mlp.linear_fc1": 2,
    "mlp.linear_fc2": 3,
}
_LAYER_WEIGHT = re.compile(
    r"(?:^|\.)layers\.(\d+)\.("
    + "|".join(re.escape(name) for name in PER_SHARD_MODULE_IDS)
    + r")\.weight$"
)
_PARALLEL = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)
_HOST_PACKAGES = ("megatron", "transformer_engine")
_DEFAULT_STD = 0.02


def initialize_weights(
    module: Module,
    seed: int,
    *,
    name_prefix: str = "",
    tp_group: dist.ProcessGroup | None = None,
    policy: Policy = "global",
) -> None:
    """Refill every parameter of ``module``, frozen ones too, but none that was loaded.

    Loaded is what ``from_pretrained`` of transformers read, and what
    :func:`.pretrained.keep_weights` marks; rank 0 logs how many parameters stay. No
    collective runs, and the global random state is the same before and after.

    Args:
        module: a model, or a part of one; wrapped or not.
        seed: the run's seed.
        name_prefix: global name of ``module`` itself, for a part that is initialised on its own
            ("language_model", a trailing dot is fine); "" for a whole model.
        tp_group: TP group of parallel layers that do not carry their own ``tp_group``.
        policy: see the module's docstring.

    Raises:
        ValueError: an unknown policy, a sharded weight whose partition is not known, experts in
            a layout that has no global order, or two weights with one seed under "per_shard".
    """
    if policy not in ("global", "per_shard"):
        raise ValueError(f"policy must be 'global' or 'per_shard', got {policy!r}")
    prefix = name_prefix.removesuffix(".")
    kept = kept_parameters(module)
    say_what_is_kept(module, prefix, kept)
    filler = _Filler(seed, tp_group, policy, _survey(module, prefix), done=set(kept))
    with torch.no_grad():
        for name, owner in global_modules(module, prefix):
            filler.fill(name, owner)


def per_shard_seed(base: int, tp_rank: int, layer: int, module_id: int) -> int:
    """Seed of one TP rank's shard of one weight of a transformer layer.

    Args:
        base: the run's seed; give modules with layers of their own (encoder, language model)
            bases that are at least ``100 * layers`` apart.
        tp_rank: place in the TP group.
        layer: *global* layer index from 0.
        module_id: 0 ``linear_qkv``, 1 ``linear_proj``, 2 ``linear_fc1``, 3 ``linear_fc2``.

    >>> per_shard_seed(1337, 0, 1, 0), per_shard_seed(1337, 1, 0, 1)
    (1437, 1001338)

    Raises:
        ValueError: a coordinate outside the range in which seeds are distinct.
    """
    ranges = (("tp_rank", tp_rank, None), ("layer", layer, 10_000), ("module_id", module_id, 100))
    for what, value, limit in ranges:
        if value < 0 or (limit is not None and value >= limit):
            raise ValueError(f"{what} must be from 0 to {limit or 'the TP size'} - 1, got {value}")
    return base + tp_rank * 1_000_000 + layer * 100 + module_id


@dataclass
class _Survey:
    """What only a module's parent knows, by ``id`` of the parameter or module.

    Attributes:
        init_methods: parameter -> how stock's parent fills it.
        names: parameter -> global name, where it is not the one of its place.
        gated: parameters of a gated MLP's first layer: each shard is ``[gate; up]``.
        configs: module -> nearest config at or above it that has ``init_method``.
    """

    init_methods: dict[int, Any] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    gated: set[int] = field(default_factory=set)
    configs: dict[int, Any] = field(default_factory=dict)


def _survey(root: Module, name_prefix: str) -> _Survey:
    survey = _Survey()
    _inherit_configs(root, None, survey.configs)
    for name, module in global_modules(root, name_prefix):
        if isinstance(module, LanguageModelEmbedding):
            for weight in module.parameters():
                survey.init_methods[id(weight)] = module.config.embedding_init_method
        elif isinstance(module, Router):
            for parameter in module.parameters(recurse=False):
                survey.init_methods[id(parameter)] = module.config.init_method
        elif isinstance(module, MLP) and module.config.gated_linear_unit:
            gate = unwrapped(module.linear_fc1)
            survey.gated |= {id(p) for p in gate.parameters(recurse=False)}
        elif isinstance(module, LanguageModule):
            _survey_output_layer(name, module, survey)
        elif isinstance(module, TorchNativePart) and module.initial_std is not None:
            draw = functools.partial(torch.nn.init.normal_, std=module.initial_std)
            drawn = [p for p in module.parameters() if p.dim() > 1]
            survey.init_methods |= {id(p): draw for p in drawn}
    return survey


def _survey_output_layer(name: str, model: LanguageModule, survey: _Survey) -> None:
    weight = getattr(getattr(model, "output_layer", None), "weight", None)
    if weight is None:
        return
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    if tied:
        survey.names[id(weight)] = join(name, "embedding.word_embeddings.weight")
    if tied or getattr(model.config, "use_mup", False):
        survey.init_methods[id(weight)] = model.config.embedding_init_method


def _inherit_configs(module: Module, config: Any, configs: dict[int, Any]) -> None:
    own = getattr(module, "config", None)
    config = own if callable(getattr(own, "init_method", None)) else config
    configs[id(module)] = config
    for child in module.children():
        _inherit_configs(child, config, configs)


@dataclass
class _Filler:
    """Fills modules one by one; see :func:`initialize_weights` for the fields."""

    seed: int
    tp_group: dist.ProcessGroup | None
    policy: Policy
    survey: _Survey
    done: set[int] = field(default_factory=set)
    shard_seeds: dict[int, str] = field(default_factory=dict)

    def fill(self, name: str, owner: Module) -> None:
        """Fill the parameters that ``owner`` itself holds and that are not filled yet."""
        todo = {
            key: p for key, p in owner.named_parameters(recurse=False) if id(p) not in self.done
        }
        self.done |= {id(p) for p in todo.values()}
        if todo and self._resets_itself(owner, todo):
            self._reset(name, owner, todo)
            return
        for key, parameter in todo.items():
            own_name = self.survey.names.get(id(parameter), join(name, key))
            self._fill_one(own_name, key, owner, parameter)

    def _resets_itself(self, owner: Module, todo: dict[str, Parameter]) -> bool:
        """Whether ``owner.reset_parameters`` is the way: not for what Megatron shards or fills."""
        if not callable(getattr(owner, "reset_parameters", None)):
            return False
        if any(_is_sharded(p) or id(p) in self.survey.init_methods for p in todo.values()):
            return False
        # Megatron's and TE's own resets draw from the RNG tracker; their norms draw nothing.
        return not _is_host(owner) or all(p.dim() <= 1 for p in todo.values())

    def _reset(self, name: str, owner: Any, todo: dict[str, Parameter]) -> None:
        """``owner.reset_parameters()`` on fp32 stand-ins, cast into the weights' own storage."""
        own = dict(owner.named_parameters(recurse=False))
        stand_ins = {
            key: Parameter(torch.empty_like(p, dtype=torch.float32)) for key, p in own.items()
        }
        owner._parameters.update(stand_ins)
        try:
            with seeded(next(iter(own.values())).device, derive_seed(self.seed, name)):
                owner.reset_parameters()
        finally:
            owner._parameters.update(own)
        for key, parameter in todo.items():
            parameter.copy_(stand_ins[key])

    def _fill_one(self, name: str, key: str, owner: Module, parameter: Parameter) -> None:
        if parameter.dim() <= 1:
            self._fill_vector(name, key, owner, parameter)
            return
        if isinstance(owner, _PARALLEL) and not hasattr(parameter, "tensor_model_parallel"):
            raise ValueError(
                f"{name} does not say how it is sharded over TP; build the model with "
                f"perform_initialization=True"
            )
        _refuse_unordered_experts(name, parameter, owner)
        init_method = self._init_method(owner, parameter)
        if _is_sharded(parameter):
            self._fill_sharded(name, owner, parameter, init_method)
        else:
            self._draw(parameter, tuple(parameter.shape), derive_seed(self.seed, name), init_method)

    def _fill_vector(self, name: str, key: str, owner: Module, parameter: Parameter) -> None:
        """Biases are zero and fused norm weights constant in stock; other constants stay."""
        if id(parameter) not in self.survey.init_methods and _is_host(owner):
            if key.endswith("bias"):
                parameter.zero_()
                return
            if key == "layer_norm_weight":
                parameter.fill_(0.0 if getattr(owner, "zero_centered_gamma", False) else 1.0)
                return
        if parameter.numel() and bool((parameter != parameter.flatten()[0]).any()):
            init_method = self._init_method(owner, parameter)
            seed = derive_seed(self.seed, name)
            self._draw(parameter, tuple(parameter.shape), seed, init_method)

    def _init_method(self, owner: Module, parameter: Any) -> InitMethod:
        explicit = self.survey.init_methods.get(id(parameter))
        if explicit is not None:
            return explicit
        config = self.survey.configs[id(owner)]
        if config is None:
            return functools.partial(torch.nn.init.normal_, std=_DEFAULT_STD)
        row_parallel = _is_sharded(parameter) and parameter.partition_dim == 1
        return config.output_layer_init_method if row_parallel else config.init_method

    def _fill_sharded(
        self, name: str, owner: Module, parameter: Any, init_method: InitMethod
    ) -> None:
        group = getattr(owner, "tp_group", None)
        group = self.tp_group if group is None else group
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        if self.policy == "per_shard":
            seed = self._shard_seed(name, rank)
            self._draw(parameter, tuple(parameter.shape), seed, init_method)
            return
        blocks = max(parameter.partition_stride, 2 if id(parameter) in self.survey.gated else 1)
        shape = list(parameter.shape)
        shape[parameter.partition_dim] *= size
        take = functools.partial(
            tp_shard, rank=rank, size=size, dim=parameter.partition_dim, blocks=blocks
        )
        self._draw(parameter, tuple(shape), derive_seed(self.seed, name), init_method, take)

    def _draw(
        self,
        parameter: Parameter,
        shape: tuple[int, ...],
        seed: int,
        init_method: InitMethod,
        take: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Draw ``shape`` in fp32 on the weight's device and keep ``take`` of it."""
        full = torch.empty(shape, dtype=torch.float32, device=parameter.device)
        with seeded(parameter.device, seed):
            init_method(full)
        parameter.copy_(full if take is None else take(full))

    def _shard_seed(self, name: str, tp_rank: int) -> int:
        """The documented seed for the four weights of a layer, a hash of the name elsewhere."""
        match = _LAYER_WEIGHT.search(name)
        if match is None:
            return derive_seed(self.seed, name, tp_rank)
        layer, module_id = int(match[1]), PER_SHARD_MODULE_IDS[match[2]]
        seed = per_shard_seed(self.seed, tp_rank, layer, module_id)
        other = self.shard_seeds.setdefault(seed, name)
        if other != name:
            raise ValueError(
                f"per_shard gives {other} and {name} the same seed {seed}; initialise modules "
                f"that have layers of their own in separate calls, with base seeds at least "
                f"100 * layers apart"
            )
        return seed


def tp_shard(full: Tensor, *, rank: int, size: int, dim: int, blocks: int = 1) -> Tensor:
    """Return one TP rank's part of a whole weight.

    Args:
        full: the weight, whole.
        rank: place in the TP group.
        size: TP size.
        dim: tensor dim that is cut.
        blocks: equal blocks along ``dim`` that are cut one by one (Megatron's
            ``partition_stride``; 2 for a gated MLP, whose shards are ``[gate; up]``).

    >>> tp_shard(torch.arange(8), rank=1, size=2, dim=0, blocks=2).tolist()
    [2, 3, 6, 7]
    """
    pieces = full.chunk(blocks * size, dim=dim)
    return torch.cat(pieces[rank::size], dim=dim)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Draw from ``seed`` on ``device``, inside; outside the generator's state is kept.

    Init methods are callables that take no generator, so each weight borrows the device's
    default one with a state of its own.
    """
    if device.type == "cpu":
        generator = torch.default_generator
    else:
        generator = torch.get_device_module(device).default_generators[device.index]
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def _is_sharded(parameter: Parameter) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def _is_host(owner: Module) -> bool:
    """Whether the class is Megatron-Core's or Transformer Engine's (this project's counts too)."""
    return type(owner).__module__.split(".")[0] in _HOST_PACKAGES


def _refuse_unordered_experts(name: str, parameter: Parameter, owner: Module) -> None:
    """Experts held in one tensor or one module cannot be named one by one."""
    if getattr(parameter, "allreduce", True) or ".local_experts." in name:
        return
    raise ValueError(
        f"{name} holds several experts at once, which have no global order over expert-parallel "
        f"ranks; build the experts with SequentialMLP (moe_grouped_gemm=False)"
    )
