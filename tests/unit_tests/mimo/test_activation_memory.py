# SPDX-License-Identifier: Apache-2.0
"""Activations that are recomputed or offloaded: gradients, what stays, what comes back when.

One process, real layers with dropout. Gradients are bit-equal: the same operations run on the
same numbers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

from megatron.core.models.mimo import ModalitySubmodules, VisionModalitySubmodules
from megatron.core.models.mimo.memory.activations import latest_offloaded
from megatron.core.models.mimo.memory.offload import HostUse, OffloadedPart, reload_when_needed
from megatron.core.models.mimo.memory.policy import POLICIES, EncoderMemory
from megatron.core.models.mimo.randomness import seed_everything
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.spec_utils import ModuleSpec
from tests.unit_tests.mimo.model_stubs import mimo_config

WIDTH, ROWS, OUT = 32, 24, 16
PAIRS = [(encoder, projector) for encoder in POLICIES for projector in POLICIES]
CHANGES = [pair for pair in PAIRS if pair != ("keep", "keep")]


class Encoder(nn.Module):
    """Attention and an MLP; dropout draws from the process's generator and from Megatron's."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.embedding = nn.Linear(WIDTH, WIDTH)
        self.mixed = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        hidden = self.embedding(x)
        query, key, value = self.mixed(self.norm(hidden)).chunk(3, dim=-1)
        with get_cuda_rng_tracker().fork():
            weights = nn.functional.dropout(torch.softmax(query @ key.mT, -1), 0.3)
        hidden = hidden + nn.functional.dropout(weights @ value, 0.3)
        return hidden + self.down(nn.functional.gelu(self.up(hidden)))


class Projection(nn.Sequential):
    """An MLP with dropout."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.3), nn.Linear(WIDTH, OUT))


def built(policy: EncoderMemory | None = None, frozen: tuple[str, ...] = ()) -> ModalitySubmodules:
    seed_everything(3)
    made = VisionModalitySubmodules(encoders={"one": Encoder()}, input_projections=[Projection()])
    for part in frozen:
        getattr(made, part).requires_grad_(False)
    if policy is not None:
        made.use_memory(policy)
    return made


def pixels(rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, 1, WIDTH, generator=torch.Generator().manual_seed(1))


def run(made: ModalitySubmodules, x: torch.Tensor) -> torch.Tensor:
    return made(encoder_inputs={"one": {"x": x}})


def gradients(made: ModalitySubmodules) -> dict[str, torch.Tensor | None]:
    found = {name: p.grad for name, p in made.named_parameters()}
    made.zero_grad(set_to_none=True)
    return found


def same(one: dict[str, torch.Tensor | None], other: dict[str, torch.Tensor | None]) -> bool:
    def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        return a is b if a is None or b is None else torch.equal(a, b)

    return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)


def step(made: ModalitySubmodules, rows: tuple[int, ...] = (ROWS, 6)) -> tuple:
    """Microbatches forward, then all backward; (outputs, gradients, numbers drawn after)."""
    outputs = [run(made, pixels(count)) for count in rows]
    sum((output * (1 + output)).sum() for output in outputs).backward()
    return [output.detach() for output in outputs], gradients(made), torch.rand(3)


@pytest.mark.parametrize(
    "rows", [(ROWS, 6), (0, ROWS, 0, 6, 0)], ids=["rows", "some_empty"]
)
@pytest.mark.parametrize(("encoder", "projector"), CHANGES)
def test_gradients_are_bit_equal(encoder: str, projector: str, rows: tuple[int, ...]):
    outputs, expected, drawn = step(built(), rows)
    made = built(EncoderMemory(encoder, projector, offload_from=0))
    found = step(made, rows)
    assert all(torch.equal(a, b) for a, b in zip(found[0], outputs, strict=True))
    assert all(gradient.any() for gradient in expected.values())
    assert same(found[1], expected)
    # Backward leaves no trace in the random state.
    assert torch.equal(found[2], drawn)
    assert made.activation_memory.host.now == 0


@pytest.mark.parametrize("frozen", [("encoders",), ("input_projections",)])
@pytest.mark.parametrize(("encoder", "projector"), CHANGES)
def test_frozen_parts(encoder: str, projector: str, frozen: tuple[str, ...]):
    _, expected, _ = step(built(frozen=frozen))
    made = built(EncoderMemory(encoder, projector, offload_from=0), frozen)
    _, found, _ = step(made)
    assert same(found, expected)
    assert sum(gradient is not None for gradient in found.values()) > 0
    # What does not train runs once per microbatch.
    twice = encoder == "recompute" and frozen != ("encoders",)
    assert made.encoders["one"].calls == (4 if twice else 2)


@pytest.mark.parametrize(("encoder", "projector"), CHANGES)
def test_nothing_to_train_has_no_backward(encoder: str, projector: str):
    made = built(EncoderMemory(encoder, projector, 0), ("encoders", "input_projections"))
    output = run(made, pixels())
    assert not output.requires_grad
    assert made.activation_memory.host.moved == 0
    with torch.no_grad():
        run(built(EncoderMemory(encoder, projector, 0)), pixels())
    assert made.activation_memory.host.moved == 0


@pytest.mark.parametrize(("encoder", "projector"), PAIRS)
def test_a_weight_gets_its_gradient_once_per_backward_pass(encoder: str, projector: str):
    """However many microbatches go back together: DDP counts, to know when all are there."""
    made = built(EncoderMemory(encoder, projector, offload_from=0))
    told: list[str] = []
    for name, parameter in made.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: told.append(name))
    sum(run(made, pixels(count)).sum() for count in (0, 5, 0, 7, 0)).backward()
    assert sorted(told) == sorted(name for name, _ in made.named_parameters())


@pytest.mark.parametrize("policy", ["recompute", "offload"])
def test_rows_that_are_given_get_their_gradient(policy: str):
    found = []
    for each in ("keep", policy):
        made = built(EncoderMemory(each, each, offload_from=0))
        rows = pixels().squeeze(1).requires_grad_()
        made(hidden_states=rows).pow(2).sum().backward()
        found.append(rows.grad)
    assert torch.equal(*found)


def allocated(run: Callable[[], None]) -> int:
    """Bytes that are allocated after ``run`` and were not before."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sum(event.nbytes() for event in events)


def test_what_stays_on_the_device():
    """Bytes that PyTorch has allocated after forward, in rows of WIDTH floats.

    What is on the host is NumPy's, see ``AtOnce``.
    """
    rows, output = 4096, OUT / WIDTH
    device: dict[tuple[str, str], float] = {}
    allocated(lambda: run(built(), pixels(rows)))  # what is allocated once
    for pair in PAIRS:
        made = built(EncoderMemory(*pair, offload_from=1024))
        held: list[torch.Tensor] = []
        bytes_now = allocated(lambda held=held, made=made: held.append(run(made, pixels(rows))))
        device[pair] = bytes_now / (4 * WIDTH * rows)
    # Random states, and what is below offload_from.
    near = {"abs": 0.05}
    # The projector has its input, and what tanh and dropout give, and dropout's noise.
    inner = device["keep", "keep"] - device["keep", "recompute"]
    assert inner == pytest.approx(3, **near)
    moved = device["keep", "keep"] - device["keep", "offload"]
    assert moved == pytest.approx(1 + 3, **near)
    assert made.activation_memory.host.now / (4 * WIDTH * rows) > 14 - output
    # What is left of the encoder is its input; the output is there in any case.
    assert device["recompute", "keep"] == pytest.approx(1 + 1 + 3 + output, **near)
    assert device["recompute", "offload"] == pytest.approx(1 + output, **near)
    assert device["recompute", "recompute"] == pytest.approx(1 + output, **near)
    assert device["offload", "keep"] == pytest.approx(1 + 3 + output, **near)
    assert device["offload", "recompute"] == pytest.approx(output, **near)
    assert device["offload", "offload"] == pytest.approx(output, **near)
    assert device["keep", "keep"] > 14


def test_weights_buffers_and_small_tensors_stay():
    made = built(EncoderMemory("offload", "offload", offload_from=4 * WIDTH * ROWS))
    packed: list[tuple] = []
    part_pack = OffloadedPart._pack

    def pack(part: OffloadedPart, tensor: torch.Tensor) -> object:
        result = part_pack(part, tensor)
        packed.append((tensor.untyped_storage().data_ptr(), tensor, result))
        return result

    OffloadedPart._pack = pack
    try:
        run(made, pixels()).sum().backward()
    finally:
        OffloadedPart._pack = part_pack
    weights = {p.untyped_storage().data_ptr() for p in made.parameters()}
    moved = {place for place, _, result in packed if isinstance(result, tuple)}
    assert moved
    assert not moved & weights
    assert weights & {place for place, _, _ in packed}  # they were asked about
    small = [t for _, t, r in packed if isinstance(r, torch.Tensor)]
    assert all(
        t.untyped_storage().nbytes() < 4 * WIDTH * ROWS or t.untyped_storage().data_ptr() in weights
        for t in small
    )


def test_tensors_in_one_storage_are_copied_once_and_come_back_as_they_lay():
    use = HostUse()
    part = OffloadedPart([], 0, use)
    whole = torch.arange(24.0).view(2, 12)
    views = [whole[:, 4:8], whole.t(), whole[1].view(torch.int32)]
    packed = [part._pack(view) for view in views]
    assert use.now == whole.nbytes
    unpacked = [part._unpack(each) for each in packed]
    assert use.moved == 2 * whole.nbytes
    for view, back in zip(views, unpacked, strict=True):
        assert torch.equal(view, back)
        assert view.stride() == back.stride()
    assert len({back.untyped_storage().data_ptr() for back in unpacked}) == 1
    assert unpacked[0].untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
    del packed, unpacked
    assert use.now == 0


def test_what_is_more_than_its_storage_stays():
    """A conjugate or a negative has its storage's bytes and a bit that says how to read them."""
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    for tensor in (numbers.conj(), numbers.conj().imag):
        part = OffloadedPart([], 0, HostUse())
        assert torch.equal(part._unpack(part._pack(tensor)), tensor)


def test_the_most_on_the_host_is_remembered():
    use = HostUse()
    for size in (3, 5):
        use.take(size)
    use.give(8)
    use.take(2)
    assert (use.now, use.most, use.moved) == (2, 8, 10)


def test_a_storage_at_the_place_of_one_that_is_gone_is_another_one():
    part = OffloadedPart([], 0, HostUse())
    packed, values = [], []
    for number in range(50):
        tensor = torch.full((1000,), float(number))
        values.append(float(number))
        packed.append(part._pack(tensor))
        del tensor  # the allocator gives the same place to the next one
    assert [part._unpack(each)[0].item() for each in packed] == values


@pytest.mark.parametrize(("encoder", "projector"), CHANGES)
def test_a_second_backward_pass(encoder: str, projector: str):
    made = built(EncoderMemory(encoder, projector, offload_from=0))
    output = run(made, pixels()).pow(2).sum()
    output.backward(retain_graph=True)
    first = gradients(made)
    output.backward()
    assert same(gradients(made), first)


def test_reload_starts_with_the_rows_gradient_and_goes_on_to_the_microbatch_before(monkeypatch):
    made = built(EncoderMemory("offload", "offload", offload_from=0))
    told: list[int] = []
    outputs, parts = [], []
    for _ in range(2):
        output = run(made, pixels())
        part = latest_offloaded(made)
        parts.append(part)
        outputs.append(reload_when_needed(output.view_as(output), part))
    assert latest_offloaded(made) is None
    assert not any(part._started for part in parts)
    outputs[1].register_hook(lambda _: told.append([part._started for part in parts]))
    outputs[1].sum().backward()
    # At the gradient of the second one's rows; the first one's when the second's are all back.
    assert told == [[False, True]]
    assert parts[0]._started
    assert made.activation_memory.host.now > 0
    outputs[0].sum().backward()
    assert made.activation_memory.host.now == 0


def test_unknown_policies_and_modalities_are_refused():
    with pytest.raises(ValueError, match="encoder must be one of .*, got 'forget'"):
        EncoderMemory(encoder="forget")
    with pytest.raises(ValueError, match="projector must be one of .*, got ''"):
        EncoderMemory(projector="")
    with pytest.raises(ValueError, match="0 bytes or more, got -1"):
        EncoderMemory(offload_from=-1)
    with pytest.raises(ValueError, match=r"encoder_memory is for \['audio'\].*\['images'\]"):
        mimo_config(encoder_memory={"audio": EncoderMemory()})


class Stubborn(VisionModalitySubmodules):
    """A modality with a forward of its own."""

    def forward(self, **inputs: object) -> None:
        return None


class Configured(nn.Linear):
    """A part with Megatron's settings."""

    def __init__(self, **settings: object) -> None:
        super().__init__(WIDTH, WIDTH)
        self.config = type("Config", (), settings)


def test_what_a_policy_cannot_be_used_with_is_refused():
    with pytest.raises(ValueError, match="Stubborn has a forward of its own"):
        Stubborn().use_memory(EncoderMemory(encoder="recompute"))
    Stubborn().use_memory(EncoderMemory())
    fused = ModuleSpec(module=Configured, params={"gradient_accumulation_fusion": True})
    made = VisionModalitySubmodules(encoders={"one": fused.module(**fused.params)})
    with pytest.raises(ValueError, match="encoder='offload' needs gradient_accumulation_fusion=Fa"):
        made.use_memory(EncoderMemory(encoder="offload"))
    with pytest.raises(ValueError, match="encoder='recompute' needs gradient_accumulation_fusion"):
        made.use_memory(EncoderMemory(encoder="recompute"))
    made.use_memory(EncoderMemory(projector="offload"))
    made = VisionModalitySubmodules(input_projections=[Configured(fp8="hybrid")])
    with pytest.raises(ValueError, match="projector='recompute' does not carry the scaling of fp8"):
        made.use_memory(EncoderMemory(projector="recompute"))
