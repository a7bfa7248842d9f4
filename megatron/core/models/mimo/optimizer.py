# SPDX-License-Identifier: Apache-2.0
"""One optimizer for a model whose modules have different parallel layouts.

Each module keeps the stock Megatron-Core optimizer over its own process groups. What must be
agreed by all ranks is agreed here: found-inf, the gradient norm over all modules (so that
clipping scales every gradient by the same factor) and whether the step succeeded. Gradients that
are not finite skip the step in every dtype: their modules' norms, which clipping needs, tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.checkpoint.frozen_state import FRESH
from megatron.core.models.mimo.gradients.module_optimizers import (
    ModuleOptimizerInfo,
    build_module_optimizers,
)
from megatron.core.models.mimo.gradients.nonfinite import (
    NonFiniteGradients,
    find_nonfinite_gradients,
)
from megatron.core.models.mimo.model.ddp_methods import finish_param_gather
from megatron.core.models.mimo.training.agreement import gathered
from megatron.core.models.mimo.training.inner_optimizers import (
    count_zeros_of,
    dynamic_scalers,
    held_scales,
    inner_optimizers,
)
from megatron.core.models.mimo.training.optimizer_settings import (
    RUN,
    check_choice,
    described,
    note_built,
    say_differences,
)
from megatron.core.models.mimo.training.optimizer_state import (
    inner_state,
    load_inner_state,
    note_names,
    sharded_inner_state,
    start_anew,
)
from megatron.core.models.mimo.training.parameter_groups import learning_rates
from megatron.core.models.mimo.training.parameter_names import Named
from megatron.core.models.mimo.wrappers import stepped
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from mimo_colocated import phases
from mimo_colocated.launch.parameter_groups import ParameterGroup

if TYPE_CHECKING:
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.models.mimo.model.base import MimoModel
    from megatron.core.process_groups_config import ProcessGroupCollection


class MimoOptimizer(MegatronOptimizer):
    """Steps the optimizers of all modules together.

    Args:
        module_infos: module name -> its optimizer on this rank; the same names on every rank.
        config: the configuration that all inner optimizers were built with.

    Attributes:
        nonfinite_modules: names of the modules whose gradients were not finite in the last step,
            the same on every rank; the step was skipped if there are any.
        nonfinite_gradients: which parameters' on which ranks; the same on every rank.
        module_norms: module -> L2 norm of its gradients in the last step, before clipping; the
            same on every rank.
    """

    def __init__(
        self, module_infos: dict[str, ModuleOptimizerInfo], config: OptimizerConfig
    ) -> None:
        self.module_infos = module_infos
        self.config = config
        self._active_optimizers: list[Any] = [
            info.optimizer
            for info in module_infos.values()
            if info.is_active and info.optimizer is not None
        ]
        self.is_stub_optimizer = not self._active_optimizers
        self.optimizer = None  # the base class and stock helpers look for it
        for info in module_infos.values():
            if info.is_active and info.optimizer is not None:
                note_names(info.optimizer, tuple(map(stepped, info.modules)))
        for inner in inner_optimizers(self._active_optimizers):
            note_built(inner)
        self.nonfinite_modules: tuple[str, ...] = ()
        self.nonfinite_gradients: tuple[NonFiniteGradients, ...] = ()
        self.module_norms: dict[str, float] = {}

    # ---- the step -------------------------------------------------------------------------

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Unscale and copy gradients; True on every rank if any rank saw an inf or nan.

        The modules' loss scalers all follow that one answer: the loss is scaled once, so scales
        that drift apart would unscale a module's gradients by the wrong factor.
        """
        scalers = dynamic_scalers(self._active_optimizers)
        with held_scales(scalers):
            found = [opt.prepare_grads() for opt in self._active_optimizers]
        found_inf = self._any_rank(any(found))
        for scaler in scalers:
            scaler.update(found_inf)
        return found_inf

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """Return the L2 norm over the gradients of all modules, the same number on every rank.

        A module's inner optimizer already reduces over the module's own groups, so all its ranks
        hold the module's norm. One rank per module contributes its square to a sum over the
        world; a sum (unlike a maximum) lets a nan through.
        """
        return self._norm_of(self.get_module_grad_norms())

    @torch.no_grad()
    def get_module_grad_norms(self) -> dict[str, float]:
        """Return the L2 gradient norm of each module, known on every rank whatever module it holds.

        Not finite if the gradient on any rank is not, copies that the norm leaves out included.
        """
        names = sorted(self.module_infos)
        norms = torch.zeros(len(names), dtype=torch.float64, device=self._device())
        for index, name in enumerate(names):
            norm = self._inner_norm(name)
            if norm is not None and (self._speaks_for(name) or not math.isfinite(norm)):
                norms[index] = norm
            copies = list(self._copies(name))
            if copies:  # nothing is added, unless they are not finite: 0 * nan
                norms[index] += torch.nn.utils.get_total_norm(copies) * 0.0
        dist.all_reduce(norms)
        return dict(zip(names, norms.tolist(), strict=True))

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, int | None]:
        """Run one step of all modules, or of none.

        Returns:
            (success, gradient norm before clipping, number of zero gradients or ``None``);
            ``(False, None, None)`` on every rank if any rank found an inf or nan;
            ``nonfinite_modules`` and ``nonfinite_gradients`` tell where.
        """
        phases.mark(phases.OPTIMIZER)
        outcome = self._step()
        phases.mark(phases.BETWEEN)
        return outcome

    def _step(self) -> tuple[bool, float | None, int | None]:
        found_inf = self.prepare_grads()
        norms = self.module_norms = self.get_module_grad_norms()
        self._note_nonfinite(norms)
        if found_inf or self.nonfinite_modules:
            return False, None, None
        grad_norm = self._norm_of(norms)
        self._clip(grad_norm)
        zeros = self.count_zeros() if self.config.log_num_zeros_in_grad else None
        success = not self._any_rank(not self.step_with_ready_grads())
        return success, grad_norm, zeros

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Step every module's optimizer on gradients that ``prepare_grads`` has readied."""
        self._forget_gathers()
        successes = [opt.step_with_ready_grads() for opt in self._active_optimizers]
        return all(successes)

    def _forget_gathers(self) -> None:
        """Weights that were gathered since backward are to be gathered again after the step.

        Stock takes no forward pass for possible between the two, and counts it as the next one's.
        """
        for info in self.module_infos.values():
            for module in info.modules:
                config = getattr(module, "ddp_config", None)
                if not getattr(config, "overlap_param_gather", False):
                    continue
                for group in module.bucket_groups + module.expert_parallel_bucket_groups:
                    finish_param_gather(group)
                    group.param_gather_dispatched = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all modules."""
        for opt in self._active_optimizers:
            opt.zero_grad(set_to_none)

    def prepare_model_params_for_param_sync(self) -> None:
        """Stage parameters for an explicit parameter all-gather, where the base has that step."""
        for opt in self._active_optimizers:
            if hasattr(opt, "prepare_model_params_for_param_sync"):
                opt.prepare_model_params_for_param_sync()

    def get_loss_scale(self) -> torch.Tensor:
        """Return the loss scale, shape (1,); all modules agree on found-inf, so it is the same."""
        if self._active_optimizers:
            return self._active_optimizers[0].get_loss_scale()
        return torch.ones(1, dtype=torch.float32, device=self._device())

    def count_zeros(self) -> int:
        """Number of zero gradient elements over all modules, the same on every rank."""
        names = sorted(self.module_infos)
        counts = torch.zeros(len(names), dtype=torch.int64, device=self._device())
        for index, name in enumerate(names):
            info = self.module_infos[name]
            if info.is_active and info.optimizer is not None:
                count = count_zeros_of(info.optimizer)
                if self._speaks_for(name):
                    counts[index] = count
        dist.all_reduce(counts)
        return int(counts.sum())

    @property
    def param_groups(self) -> list[dict]:
        """Parameter groups of all modules, one list, for learning-rate schedulers."""
        return [group for opt in self._active_optimizers for group in opt.param_groups]

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rates of this rank's modules: ``MODULE``, ``MODULE.groups.0``."""
        return {
            name: rate
            for module, info in self.module_infos.items()
            if info.is_active and info.optimizer
            for name, rate in learning_rates(module, info.optimizer.param_groups).items()
        }

    # ---- checkpoints ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return module name -> the inner optimizer's state on this rank, ``None`` without one.

        Complete also with the distributed optimizer, whose shards it holds. It fits the same rank
        of the same layout; ``sharded_state_dict`` and ``CheckpointStore`` fit any layout. Tensors
        are the optimizer's own: copy or write them before the next step.
        """
        return {
            name: inner_state(info.optimizer) if info.is_active and info.optimizer else None
            for name, info in self.module_infos.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any], settings: str = RUN) -> None:
        """Load what ``state_dict`` or a loaded ``sharded_state_dict`` holds.

        Load the model's weights before: what starts fresh takes its fp32 copies from them. With
        dynamic loss scaling all ranks call it together: a module that starts fresh takes the loss
        scale of those that go on.

        Args:
            state_dict: is left as it is.
            settings: ``"run"``: what this run's ``OptimizerConfig`` changes (learning rate, weight
                decay, betas, momentum, ...) counts, the rest goes on from where it was.
                ``"checkpoint"``: all settings of the saved parameter groups count. Rank 0 logs
                what differs.

        Raises:
            ValueError: if ``settings`` is neither; a module of this rank is missing from
                ``state_dict``; the state is of another kind of optimizer or of another rank.
        """
        check_choice(settings)
        recorded = []
        for name, info in self.module_infos.items():
            if not (info.is_active and info.optimizer):
                continue
            if not state_dict.get(name):
                raise ValueError(
                    f"optimizer state has no module '{name}'; it holds {sorted(state_dict)}"
                )
            if FRESH not in (state := state_dict[name]):
                recorded.append(load_inner_state(info.optimizer, state, name, settings))
            else:
                start_anew(info.optimizer)
        if recorded:
            say_differences(recorded[0], described(self.config), settings)
        if self.config.fp16 and self.config.loss_scale is None:
            self._agree_on_loss_scale(state_dict)

    def _agree_on_loss_scale(self, loaded: dict[str, Any]) -> None:
        """Give all modules on all ranks the scaler state of one that was loaded."""
        going_on = [
            info.optimizer
            for name, info in self.module_infos.items()
            if info.is_active and info.optimizer and FRESH not in loaded[name]
        ]
        mine = [scaler.state_dict() for scaler in dynamic_scalers(going_on)]
        # On the host: the ranks' devices differ.
        first = {**mine[0], "scale": mine[0]["scale"].cpu()} if mine else None
        known: Any = next((state for state in gathered(first) if state is not None), None)
        for scaler in dynamic_scalers(self._active_optimizers) if known else []:
            scaler.load_state_dict(known)

    def sharded_state_dict(
        self, model_sharded_state_dict: dict, is_loading: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Return module name -> its optimizer's sharded state, empty for modules of other ranks."""
        state: dict[str, Any] = {}
        for name, info in self.module_infos.items():
            state[name] = {}
            if not (info.is_active and info.optimizer):
                continue
            state[name] = sharded_inner_state(
                info.optimizer,
                model_sharded_state_dict,
                name,
                self._replica_id(name),
                is_loading=is_loading,
                **kwargs,
            )
        return state

    def reload_model_params(self, state_dict: dict | None = None) -> None:
        """Refresh the inner optimizers' main parameters from the model's."""
        for opt in self._active_optimizers:
            if state_dict is None:
                opt.reload_model_params()
            else:
                opt.reload_model_params(state_dict)

    # ---- what all ranks agree on ----------------------------------------------------------

    @staticmethod
    def _norm_of(module_norms: dict[str, float]) -> float:
        return sum(n * n for n in module_norms.values()) ** 0.5

    def _note_nonfinite(self, module_norms: dict[str, float]) -> None:
        """Who has gradients that are not finite; parameters are looked at only if somebody has."""
        self.nonfinite_modules = tuple(n for n, v in module_norms.items() if not math.isfinite(v))
        self.nonfinite_gradients = ()
        if self.nonfinite_modules:
            self.nonfinite_gradients = find_nonfinite_gradients(
                {name: self.module_infos[name].modules for name in self.nonfinite_modules}
            )

    def _device(self) -> torch.device:
        for opt in inner_optimizers(self._active_optimizers):
            for param in opt.get_parameters():
                return param.device
        return torch.empty(0).device if not torch.cuda.is_available() else _current_device()

    def _inner_norm(self, name: str) -> float | None:
        """This rank's view of the module's norm; a collective over the module's groups."""
        info = self.module_infos[name]
        if not (info.is_active and info.optimizer):
            return None
        return float(info.optimizer.get_grad_norm() or 0.0)

    def _copies(self, name: str) -> Iterator[torch.Tensor]:
        """Gradients of a module of which norms count one copy only: over TP, or tied over PP."""
        info = self.module_infos[name]
        if not (info.is_active and info.optimizer):
            return
        tp_group = getattr(info.pg_collection, "tp", None)
        tp = tp_group is not None and tp_group.size() > 1
        for inner in inner_optimizers([info.optimizer]):
            for param in inner.get_parameters():
                copied = tp and not getattr(param, "tensor_model_parallel", False)
                if copied or getattr(param, "shared", False):
                    gradient = getattr(param, "decoupled_grad", None)
                    gradient = param.grad if gradient is None else gradient
                    if gradient is not None:
                        yield gradient

    def _speaks_for(self, name: str) -> bool:
        """Whether this is the first rank of the module's grid (of the world without a grid)."""
        grid = self.module_infos[name].grid
        return dist.get_rank() == (grid.rank_offset if grid is not None else 0)

    def _any_rank(self, flag: bool) -> bool:
        value = torch.tensor([float(flag)], device=self._device())
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def _clip(self, grad_norm: float) -> None:
        for opt in inner_optimizers(self._active_optimizers):
            if getattr(opt, "is_stub_optimizer", False) or opt.config.clip_grad <= 0.0:
                continue
            params: list[Any] = opt.get_parameters()
            if params:
                clip_grad_by_total_norm_fp32(
                    params,
                    max_norm=opt.config.clip_grad,
                    total_norm=grad_norm,
                    use_decoupled_grad=opt.config.use_precision_aware_optimizer,
                )

    def _replica_id(self, name: str) -> tuple[int, ...]:
        """(0, …) on exactly one rank of the module: that one writes the module's common part."""
        grid = self.module_infos[name].grid
        return (dist.get_rank() - (grid.rank_offset if grid is not None else 0),)


def get_mimo_optimizer(
    mimo_model: MimoModel,
    config: OptimizerConfig,
    groups: Sequence[ParameterGroup] = (),
    named: Sequence[Named] | None = None,
) -> MimoOptimizer:
    """Build one inner optimizer per module, over the groups of the module's grid.

    Args:
        mimo_model: modules already wrapped in DistributedDataParallel; its config carries
            ``module_to_grid_map``.
        config: configuration of all inner optimizers.
        groups: other learning rates and weight decay for some parameters.
        named: this rank's parameters, where groups use other names than the model's own.

    Raises:
        ValueError: if the model has no grids; on every rank: the optimizer is not supported, or
            the dtype of a parameter does not fit ``config``; a module asks for several
            distributed-optimizer instances; a group names nothing that trains.
    """
    infos = build_module_optimizers(
        mimo_model, config, _get_pg_collection_for_optimizer, groups, named
    )
    return MimoOptimizer(infos, config)


def _get_pg_collection_for_optimizer(grid: HyperCommGrid) -> ProcessGroupCollection:
    """The groups of ``grid``, made on first use (every rank builds its optimizer together)."""
    from megatron.core.models.mimo.training.groups import create_process_groups

    return create_process_groups(grid)


def _current_device() -> torch.device:
    accelerator: Any = torch.accelerator.current_accelerator()
    return torch.device(accelerator.type, torch.cuda.current_device())
