# SPDX-License-Identifier: Apache-2.0
"""What accelerators and the links between them do: presets, and files that a calibration writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Machine:
    """Equal nodes of equal accelerators.

    Attributes:
        name: of the accelerator.
        node: accelerators of a node.
        memory: bytes of one accelerator.
        matmul, attention: FLOPs a second in products with weights of a language model, and in its
            attention, as they are reached in training, forward and backward together.
        encoder: FLOPs a second in an encoder, whose products are smaller.
        memory_rate: bytes a second to and from an accelerator's memory.
        inside, between: bytes a second that one accelerator sends to others of its node, and to
            another node, as they are reached.
        inside_latency, between_latency: seconds until a collective's first byte is there.
        hop_latency: seconds more for every rank of a collective beyond two.
        layer_start: seconds to start the operations of one layer's forward pass, its products and
            its attention, whatever their sizes; a backward pass starts twice as many.
        hidden: the part of a collective's time that products beside it hide: 1 where links need no
            core, 0 where ranks compute and send on the same cores.
        host: bytes a second between an accelerator and its host's memory.
        communicator: bytes of memory that a process group takes.
        fused: layers are Transformer Engine's, which keep less than Megatron's local ones.

    Raises:
        ValueError: a number that is not positive; what starts, hides or is held by a communicator
            may be 0; more than all of a collective hidden.
    """

    name: str
    node: int
    memory: float
    matmul: float
    attention: float
    encoder: float
    memory_rate: float
    inside: float
    between: float
    inside_latency: float
    between_latency: float
    hop_latency: float
    layer_start: float
    hidden: float
    host: float
    communicator: float
    fused: bool

    def __post_init__(self) -> None:
        for each in fields(self):
            value, name = getattr(self, each.name), each.name
            if name in ("name", "fused"):
                continue
            if not value >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value!r}")
            if value == 0 and name not in _MAY_BE_NOTHING:
                raise ValueError(f"{name} must be more than 0, got {value!r}")
        if self.hidden > 1:
            raise ValueError(f"hidden must be at most 1, got {self.hidden!r}")

    def link(self, span: int, ranks: int = 2) -> tuple[float, float]:
        """Return the slowest link's rate, and what a collective of ``ranks`` ranks takes to begin.

        Args:
            span: neighbours among which the ranks are.
            ranks: that take part.
        """
        begin = self.hop_latency * max(0, ranks - 2)
        if span <= self.node:
            return self.inside, self.inside_latency + begin
        return self.between, self.between_latency + begin

    def seen(self, collective: float, products: float) -> float:
        """Return the seconds of a collective that the products beside it do not hide.

        >>> h100 = PRESETS["h100"]
        >>> h100.seen(3.0, 2.0), replace(h100, hidden=0.0).seen(3.0, 2.0)
        (1.0, 3.0)
        """
        return collective - self.hidden * min(collective, products)

    def group_link(self, ranks: int, stride: int) -> tuple[float, float]:
        """Return what one rank reaches in a collective of ``ranks`` ranks, ``stride`` apart.

        A ring that enters a node passes all of its members there before it leaves, and there are
        as many rings as members in a node, each through a network card of its own: the links of
        a node's members add up, as far as the links inside a node carry.

        >>> h100 = PRESETS["h100"]
        >>> h100.group_link(4, 1)[0] == h100.inside, h100.group_link(4, 8)[0] == h100.between
        (True, True)
        """
        rate, latency = self.link(ranks * stride, ranks)
        if ranks * stride <= self.node:
            return rate, latency
        members = min(ranks, max(1, self.node // stride))
        return min(self.inside, members * self.between), latency


_MAY_BE_NOTHING = (
    "communicator", "inside_latency", "between_latency", "hop_latency", "layer_start", "hidden"
)  # fmt: skip


@dataclass(frozen=True)
class DataSheet:
    """What a vendor says of an accelerator and of the machines that it is sold in.

    Attributes:
        flops: FLOPs a second of dense products in bfloat16.
        memory: bytes.
        memory_rate: bytes a second.
        inside: bytes a second to other accelerators of the node, in one direction.
        between: bytes a second to other nodes, per accelerator, in one direction.
        host: bytes a second to the host, in one direction.
    """

    flops: float
    memory: float
    memory_rate: float
    inside: float
    between: float
    host: float


DATA_SHEETS = {
    # NVIDIA A100 80GB SXM data sheet (2021): 312 TFLOPS, 2,039 GB/s, NVLink 600 GB/s in both
    # directions, PCIe 4 64 GB/s in both; DGX A100: eight 200 Gb/s InfiniBand cards for 8 GPUs.
    "a100": DataSheet(312e12, 80e9, 2.039e12, 300e9, 25e9, 32e9),
    # NVIDIA H100 SXM data sheet: 1,979 TFLOPS with sparsity, so 989.5 dense; 3.35 TB/s, NVLink
    # 900 GB/s in both directions, PCIe 5 128 GB/s in both; DGX H100: eight 400 Gb/s cards.
    "h100": DataSheet(989.5e12, 80e9, 3.35e12, 450e9, 50e9, 64e9),
    # NVIDIA H200 SXM data sheet: as H100, with 141 GB at 4.8 TB/s.
    "h200": DataSheet(989.5e12, 141e9, 4.8e12, 450e9, 50e9, 64e9),
    # NVIDIA DGX B200 data sheet, divided by its 8 GPUs: 36 PFLOPS in bfloat16 with sparsity, so
    # 2,250 TFLOPS dense; 1,440 GB, 64 TB/s, NVLink 14.4 TB/s in both directions, 400 Gb/s cards.
    "b200": DataSheet(2250e12, 180e9, 8e12, 900e9, 50e9, 64e9),
}
"""Accelerator -> its data sheet."""


@dataclass(frozen=True)
class Reached:
    """Which part of a data sheet's figures training reaches; the constants of the model.

    Attributes:
        matmul, attention, encoder: of the FLOPs.
        inside, between: of the links' bytes.
    """

    matmul: float
    attention: float
    encoder: float
    inside: float
    between: float


REACHED = Reached(matmul=0.527, attention=0.290, encoder=0.344, inside=0.499, between=0.916)
"""Fitted to four published rows on H100 by ``python -m benchmarks.plan_check``, which prints them.

Accelerators that nobody has published rows of are taken to reach the same parts.
"""
# NCCL's latency of small collectives, inside a node and between nodes (nccl-tests' documentation
# and published runs of it on DGX machines show 10 to 40 microseconds).
_INSIDE_LATENCY, _BETWEEN_LATENCY = 10e-6, 25e-6
# A communicator's buffers on NCCL, as reported by users of Megatron-Core.
_COMMUNICATOR = 0.5e9
_NODE = 8
# Of copies through page-locked memory, against the bus's figure.
_HOST = 0.8
# Of elementwise kernels such as Adam's, against the memory's figure.
_MEMORY_RATE = 0.8


def machine_of(name: str, sheet: DataSheet, reached: Reached) -> Machine:
    """Return an accelerator that reaches these parts of its data sheet.

    Args:
        name: of the accelerator.
        sheet: its data sheet.
        reached: the parts.
    """
    return Machine(
        name=name,
        node=_NODE,
        memory=sheet.memory,
        matmul=sheet.flops * reached.matmul,
        attention=sheet.flops * reached.attention,
        encoder=sheet.flops * reached.encoder,
        memory_rate=sheet.memory_rate * _MEMORY_RATE,
        inside=sheet.inside * reached.inside,
        between=sheet.between * reached.between,
        inside_latency=_INSIDE_LATENCY,
        between_latency=_BETWEEN_LATENCY,
        # Rings of NCCL's begin everywhere at once, as far as published runs show.
        hop_latency=0.0,
        # Kernels are queued ahead of the accelerator, and take longer than to be queued.
        layer_start=0.0,
        # Links and network cards move bytes without the accelerator's cores.
        hidden=1.0,
        host=sheet.host * _HOST,
        communicator=_COMMUNICATOR,
        fused=True,
    )


PRESETS = {name: machine_of(name, sheet, REACHED) for name, sheet in DATA_SHEETS.items()}
"""Name -> machine."""


def find_machine(name: str) -> Machine:
    """Return a preset, or what a calibration has written to a file.

    Args:
        name: of a preset, or a path.

    Raises:
        ValueError: there is neither, or the file is no machine.
    """
    if name.lower() in PRESETS:
        return PRESETS[name.lower()]
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(
            f"machine {name!r} is neither a preset nor a file; presets are {sorted(PRESETS)}, and "
            "`mimo calibrate FILE` measures this machine"
        )
    try:
        return machine_from(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is no machine: {error}; calibrate it again") from None


def machine_from(values: Mapping[str, Any]) -> Machine:
    """Return a machine from the fields of :class:`Machine`.

    Raises:
        ValueError: a field is missing or unknown, or its value is not allowed.
    """
    known = {each.name for each in fields(Machine)}
    if not isinstance(values, Mapping) or set(values) != known:
        raise ValueError(f"its fields must be {sorted(known)}, got {sorted(values)}")
    wrong = {
        name: value
        for name, value in values.items()
        if name not in ("name", "fused")
        and (isinstance(value, bool) or not isinstance(value, int | float))
    }
    if wrong:
        raise ValueError(f"these fields must be numbers: {wrong}")
    if not isinstance(values["fused"], bool):
        raise ValueError(f"fused must be true or false, got {values['fused']!r}")
    return Machine(**values)


def to_json(machine: Machine) -> str:
    """Return a machine as the text that :func:`find_machine` reads."""
    return json.dumps(asdict(machine), indent=1) + "\n"


def with_memory(machine: Machine, memory: float) -> Machine:
    """Return a machine whose accelerators have another memory, in bytes."""
    return replace(machine, memory=memory)
