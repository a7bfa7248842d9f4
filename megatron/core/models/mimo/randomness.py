# SPDX-License-Identifier: Apache-2.0
"""Random state of its own for every module.

Megatron-Core keeps one generator and one tracker per process, seeded from one TP rank. Colocated
modules differ in TP: with shared state a dropout mask could differ over the encoder's TP ranks
where activations are replicated, or agree where they are sharded. Here each module owns a full
set of states, switched in while its forward runs.

Which coordinates a seed depends on decides who agrees:

========================  ============================  =====================================
state                     depends on                    used for
========================  ============================  =====================================
default                   module, dp, cp, pp            activations replicated over TP
``model-parallel-rng``    module, dp, cp, pp, tp        activations and weights sharded over TP
``data-parallel-rng``     module                        what must agree everywhere
``expert-parallel-rng``   module, dp, cp, pp, tp, ep    expert layers
========================  ============================  =====================================

A run that goes on in the layout that saved gets its states back. In another layout they have no
owner: the states are derived anew, from the same and the number of steps done, so that the run
neither repeats the numbers of its first steps nor depends on who loads when.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
    get_expert_parallel_rng_tracker_name,
    model_parallel_cuda_manual_seed,
)
from megatron.core.utils import unwrap_model

_MODEL_PARALLEL = "model-parallel-rng"


def derive_seed(seed: int, *parts: int | str) -> int:
    """Return a 63-bit seed of ``seed`` and coordinates, the same on every machine, in every run."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed the process: the default generators and Megatron's tracker (TP-independent).

    Modules built under :class:`ModuleRandomness` switch to their own states afterwards.
    """
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, tp_rank=0, ep_rank=0, etp_rank=0)


class ModuleRandomness:
    """Switches a module's own random states in around its forward.

    So around that of a language model's ``embedding``, which ``MimoModel`` calls by itself.

    Args:
        modules: (module name, module), as built (before or inside DDP wrapping); a mapping, or
            pairs where several virtual pipeline stages go by one name.
        collections: module name -> its process groups (``tp``, ``cp``, ``dp``, ``ep`` are read).
        seed: the run's seed.
    """

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module] | Iterable[tuple[str, torch.nn.Module]],
        collections: dict[str, ProcessGroupCollection],
        seed: int,
    ) -> None:
        self.seed = seed
        named: Any = list(modules.items() if isinstance(modules, Mapping) else modules)
        self._collections = {name: collections[name] for name, _ in named}
        self._states: dict[str, dict[str, Any]] = {}
        self._outside: dict[str, list[dict[str, Any] | None]] = {}
        for name, groups in self._collections.items():
            self._states[name] = _initial_state(name, groups, seed)
            self._outside[name] = []
        for name, module in named:
            for part in (module, getattr(unwrap_model(module), "embedding", None)):
                if isinstance(part, torch.nn.Module):
                    part.register_forward_pre_hook(self._entering(name))
                    # always_call: an exception must not leave the module's state behind.
                    part.register_forward_hook(self._leaving(name), always_call=True)

    def get_states(self) -> dict[str, Any]:
        """Return the states of all modules, for a checkpoint."""
        return {name: _clone(state) for name, state in self._states.items()}

    def set_states(self, states: dict[str, Any]) -> None:
        """Restore what ``get_states`` returned.

        Raises:
            ValueError: if the modules differ.
        """
        if set(states) != set(self._states):
            raise ValueError(
                f"random states are of modules {sorted(states)}, "
                f"this run has {sorted(self._states)}"
            )
        self._states = {name: _clone(state) for name, state in states.items()}

    def reseed(self, step: int) -> None:
        """Set the states for going on after ``step`` steps in another layout than theirs.

        The process's own generators (Python, NumPy, PyTorch, Megatron's tracker) are seeded too,
        the same on every rank, as they are at the start of a run.
        """
        seed = derive_seed(self.seed, "after step", step)
        seed_everything(derive_seed(seed, "process"))
        random.seed(derive_seed(seed, "python"))
        np.random.seed(derive_seed(seed, "numpy") % 2**32)
        for name, groups in self._collections.items():
            self._states[name] = _initial_state(name, groups, seed)

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, _args: Any) -> None:
            if self._outside[name]:  # within the module already: its states are switched in
                self._outside[name].append(None)
                return
            self._outside[name].append(capture_states())
            restore_states(self._states[name])

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, _args: Any, _output: Any) -> None:
            if not self._outside[name]:  # the pre-hook itself failed
                return
            outside = self._outside[name].pop()
            if outside is not None:
                self._states[name] = capture_states()
                restore_states(outside)

        return hook


def _initial_state(name: str, groups: ProcessGroupCollection, seed: int) -> dict[str, Any]:
    tp, cp, dp = groups.tp.rank(), groups.cp.rank(), groups.dp.rank()
    ep = groups.ep.rank() if groups.ep is not None else 0
    pp = groups.pp.rank() if getattr(groups, "pp", None) is not None else 0
    # The first stage draws what a model without stages does; a later one something else, since
    # its layers are others.
    stage = ("pp", pp) if pp else ()
    expert = derive_seed(seed, name, "ep", dp, cp, tp, ep, *stage)
    seeds = {
        _MODEL_PARALLEL: derive_seed(seed, name, "tp", dp, cp, tp, *stage),
        get_data_parallel_rng_tracker_name(): derive_seed(seed, name, "all"),
        get_expert_parallel_rng_tracker_name(): expert,
    }
    outside = capture_states()
    states = {key: _state_of_seed(value) for key, value in seeds.items()}
    default = _state_of_seed(derive_seed(seed, name, "default", dp, cp, *stage))
    restore_states(outside)
    return {"default": default, "tracker": states}


def _state_of_seed(seed: int) -> torch.Tensor:
    torch.cuda.manual_seed(seed)
    return torch.cuda.get_rng_state()


def capture_states() -> dict[str, Any]:
    """Return the device's random state and those of Megatron-Core's tracker."""
    return {
        "default": torch.cuda.get_rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }


def restore_states(state: dict[str, Any]) -> None:
    """Put back what :func:`capture_states` returned."""
    torch.cuda.set_rng_state(state["default"])
    get_cuda_rng_tracker().set_states(dict(state["tracker"]))


def _clone(state: dict[str, Any]) -> dict[str, Any]:
    tracker = {key: value.clone() for key, value in state["tracker"].items()}
    return {"default": state["default"].clone(), "tracker": tracker}


def get_rng_state(modules: ModuleRandomness | None) -> dict[str, Any]:
    """Return all random states of the process, for a checkpoint."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
        "modules": modules.get_states() if modules else {},
    }


def set_rng_state(state: dict[str, Any], modules: ModuleRandomness | None) -> None:
    """Put back what ``get_rng_state`` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if modules:
        modules.set_states(state["modules"])
