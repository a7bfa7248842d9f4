# SPDX-License-Identifier: Apache-2.0
"""Random states of modules: who agrees, what is restored, what a checkpoint replays.

One process: states depend on coordinates only, and stand-ins for process groups give them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron.core.models.mimo.randomness import (
    ModuleRandomness,
    derive_seed,
    seed_everything,
)
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
    get_expert_parallel_rng_tracker_name,
)
from tests.unit_tests.mimo.model_stubs import StubGroup

SEED = 3
AXES = ("dp", "cp", "pp", "tp", "ep")
# What each state depends on besides the module, as the table in randomness.py says.
DEPENDS_ON = {
    "default": {"dp", "cp", "pp"},
    "model-parallel-rng": {"dp", "cp", "pp", "tp"},
    get_data_parallel_rng_tracker_name(): set(),
    get_expert_parallel_rng_tracker_name(): {"dp", "cp", "pp", "tp", "ep"},
}


class Drawing(torch.nn.Module):
    """Its forward draws from each state, as dropout does."""

    def forward(self, fail: bool = False) -> dict[str, torch.Tensor]:
        """Draw 4 numbers of each state; raises after drawing if ``fail``."""
        drawn = {"default": torch.rand(4)}
        for name in list(DEPENDS_ON)[1:]:
            with get_cuda_rng_tracker().fork(name):
                drawn[name] = torch.rand(4)
        if fail:
            raise RuntimeError("in forward")
        return drawn


@pytest.fixture(autouse=True)
def process_states() -> Iterator[None]:
    """Seeds the process for a test and puts everything back after it."""
    outside, tracker = torch.get_rng_state(), get_cuda_rng_tracker().get_states()
    seed_everything(SEED)
    yield
    torch.set_rng_state(outside)
    get_cuda_rng_tracker().set_states(tracker)


def groups(**ranks: int) -> SimpleNamespace:
    return SimpleNamespace(**{axis: StubGroup(2, ranks.get(axis, 0)) for axis in AXES})


def module_at(name: str = "images", seed: int = SEED, **ranks: int) -> Drawing:
    module = Drawing()
    ModuleRandomness({name: module}, {name: groups(**ranks)}, seed)
    return module


def process_state() -> dict[str, torch.Tensor]:
    tracker = get_cuda_rng_tracker().get_states()
    return {"default": torch.get_rng_state(), **{k: v.clone() for k, v in tracker.items()}}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return sorted(one) == sorted(other) and all(torch.equal(one[k], other[k]) for k in one)


def test_ranks_agree_exactly_where_the_table_says() -> None:
    places = [
        dict(zip(AXES, place, strict=True)) for place in itertools.product((0, 1), repeat=len(AXES))
    ]
    drawn = [module_at(**place)() for place in places]
    for state, axes in DEPENDS_ON.items():
        for (a, one), (b, other) in itertools.combinations(zip(places, drawn, strict=True), 2):
            agree = all(a[axis] == b[axis] for axis in axes)
            assert torch.equal(one[state], other[state]) is agree, (state, a, b)


def test_modules_and_seeds_and_states_differ() -> None:
    drawn = [module_at("images")(), module_at("language")()]
    drawn += [module_at("images", seed=seed)() for seed in (0, 1, 4)]
    numbers = [tuple(part.tolist()) for parts in drawn for part in parts.values()]
    assert len(set(numbers)) == len(numbers) == 5 * len(DEPENDS_ON)


def test_successive_forwards_draw_on() -> None:
    module = module_at()
    first, second = module(), module()
    assert not any(torch.equal(first[state], second[state]) for state in DEPENDS_ON)


def test_the_process_is_left_as_it_was() -> None:
    before = process_state()
    module = module_at()
    assert equal(process_state(), before)
    module()
    assert equal(process_state(), before)


def test_the_process_cannot_disturb_a_module() -> None:
    expected = [module_at() for _ in range(2)]
    undisturbed = [expected[0](), expected[0]()]
    first = expected[1]()
    torch.manual_seed(99)
    torch.rand(7)
    assert equal(first, undisturbed[0])
    assert equal(expected[1](), undisturbed[1])


def test_modules_draw_independently_of_each_other() -> None:
    modules = {"images": Drawing(), "language": Drawing()}
    ModuleRandomness(modules, {name: groups() for name in modules}, SEED)
    mixed = [modules["language"](), modules["images"](), modules["language"]()]
    alone = module_at("language")
    assert equal(mixed[0], alone())
    assert equal(mixed[2], alone())
    assert equal(mixed[1], module_at("images")())


def test_an_exception_in_forward_restores_the_process() -> None:
    before, module = process_state(), module_at()
    with pytest.raises(RuntimeError, match="in forward"):
        module(fail=True)
    assert equal(process_state(), before)
    module()
    assert equal(process_state(), before)


def test_a_module_inside_another_switches_to_its_own_states_and_back() -> None:
    class Outer(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
            """Draw, run the inner module, draw on."""
            return torch.rand(2), self.inner(), torch.rand(2)

    inner = Drawing()
    outer = Outer(inner)
    names = {"language": outer, "images": inner}
    ModuleRandomness(names, {name: groups() for name in names}, SEED)
    before = process_state()
    first, drawn, then = outer()
    assert equal(drawn, module_at("images")())
    assert torch.equal(torch.cat([first, then]), module_at("language")()["default"])
    assert equal(process_state(), before)


def test_states_replay_exactly_what_followed() -> None:
    module = Drawing()
    randomness = ModuleRandomness({"images": module}, {"images": groups()}, SEED)
    module()
    states = randomness.get_states()
    followed = [module(), module()]
    # Not changed by going on: a checkpoint may be written after the next step has begun.
    other = Drawing()
    another_run = ModuleRandomness({"images": other}, {"images": groups()}, seed=SEED + 1)
    another_run.set_states(states)
    assert equal(other(), followed[0])
    assert equal(other(), followed[1])
    randomness.set_states(states)
    assert equal(module(), followed[0])


def test_states_survive_a_file(tmp_path: pytest.TempPathFactory) -> None:
    module = Drawing()
    randomness = ModuleRandomness({"images": module}, {"images": groups()}, SEED)
    torch.save(randomness.get_states(), tmp_path / "states.pt")
    expected = module()
    randomness.set_states(torch.load(tmp_path / "states.pt"))
    assert equal(module(), expected)


@pytest.mark.parametrize("names", [["language"], [], ["images", "language"]])
def test_states_of_other_modules_are_refused(names: list[str]) -> None:
    randomness = ModuleRandomness({"images": Drawing()}, {"images": groups()}, SEED)
    states = randomness.get_states()
    with pytest.raises(ValueError, match=r"are of modules .*this run has \['images'\]"):
        randomness.set_states(dict.fromkeys(names, states["images"]))
    assert equal(randomness.get_states()["images"]["tracker"], states["images"]["tracker"])


def test_a_derived_seed_is_fixed_for_all_time() -> None:
    assert derive_seed(3, "images", "tp", 0, 1) == derive_seed(3, "images", "tp", 0, 1)
    seeds = {derive_seed(3, *place) for place in itertools.product("ab", range(12), range(12))}
    assert len(seeds) == 2 * 12 * 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    # (1, 23) and (12, 3) must not become the same text.
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(1, 2, 3) != derive_seed(1, 23)


def test_seeding_the_process_is_repeatable_and_depends_on_the_seed() -> None:
    draws = []
    for seed in (5, 5, 6):
        seed_everything(seed)
        with get_cuda_rng_tracker().fork():
            forked = torch.rand(3)
        draws.append(torch.cat([torch.rand(3), forked]))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# ---- going on in another layout ---------------------------------------------------------------


def drawn_after(step: int, **ranks: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a module, and the process outside of it, draw after ``step`` steps elsewhere."""
    module = Drawing()
    randomness = ModuleRandomness({"images": module}, {"images": groups(**ranks)}, SEED)
    torch.rand(7)  # whatever happened before
    module()
    randomness.reseed(step)
    process = torch.cat([torch.rand(2), torch.tensor([random.random(), np.random.rand()])])
    return module(), process


def test_reseeding_depends_on_step_and_coordinates_alone() -> None:
    drawn, process = drawn_after(5, dp=1)
    again, process_again = drawn_after(5, dp=1)
    assert equal(drawn, again)
    assert torch.equal(process, process_again)
    for other in ({"dp": 0}, {"dp": 1, "tp": 1}):
        elsewhere, process_elsewhere = drawn_after(5, **other)
        differing = {"dp"} if other == {"dp": 0} else {"tp"}
        for name, axes in DEPENDS_ON.items():
            assert torch.equal(drawn[name], elsewhere[name]) is not bool(axes & differing), name
        assert torch.equal(process, process_elsewhere)


def test_reseeding_repeats_no_numbers_of_another_step() -> None:
    first = module_at(dp=1)()  # of the run's start
    later = [drawn_after(step, dp=1)[0] for step in (5, 6)]
    for one, other in itertools.combinations([first, *later], 2):
        assert not any(torch.equal(one[name], other[name]) for name in DEPENDS_ON)
    assert not torch.equal(drawn_after(5)[1], drawn_after(6)[1])


# ---- the embedding of a language model --------------------------------------------------------


class Embedding(torch.nn.Module):
    """Drops some of what it returns, as Megatron-Core's does."""

    def forward(self) -> torch.Tensor:
        """4 numbers of the default state."""
        return torch.rand(4)


class Language(torch.nn.Module):
    """Calls its embedding unless it is given one's result."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Embedding()

    def forward(self, embedded: torch.Tensor | None = None) -> torch.Tensor:
        """8 numbers: the embedding's and its own."""
        return torch.cat([self.embedding() if embedded is None else embedded, torch.rand(4)])


def test_an_embedding_that_is_called_by_itself_draws_the_modules_numbers() -> None:
    before = process_state()
    modules = [Language(), Language()]
    for module in modules:
        ModuleRandomness({"language": module}, {"language": groups(dp=1)}, SEED)
    whole = modules[0](), modules[0]()
    apart = modules[1](modules[1].embedding()), modules[1]()
    assert all(torch.equal(one, other) for one, other in zip(whole, apart, strict=True))
    assert torch.equal(whole[0], torch.cat([first_numbers(dp=1), first_numbers(4, dp=1)]))
    assert equal(process_state(), before)


def first_numbers(skipped: int = 0, **ranks: int) -> torch.Tensor:
    """Of the language model's default state, four after those that are skipped."""

    class Plain(torch.nn.Module):
        def forward(self) -> torch.Tensor:
            torch.rand(skipped)
            return torch.rand(4)

    module = Plain()
    ModuleRandomness({"language": module}, {"language": groups(**ranks)}, SEED)
    return module()
