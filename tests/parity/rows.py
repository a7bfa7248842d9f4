# SPDX-License-Identifier: Apache-2.0
"""The table of comparisons: what is run in parallel, and what it is compared with."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# After these training steps the change of the weights is compared; no row trains fewer.
CHANGE_STEPS = 3
MASKS = ("uniform", "uneven", "one_sample", "none")
IMAGES = ("all", "mixed", "none")


class UnknownRowError(ValueError):
    """A name that is no row's; the message lists those that are."""


def axis_sizes(layout: str) -> dict[str, int]:
    """Sizes of the axes in a layout's text.

    >>> axis_sizes("tp=2,pp=2,dp=1")
    {'tp': 2, 'pp': 2, 'dp': 1}
    """
    pairs = (part.partition("=") for part in layout.split(","))
    return {axis: int(size) for axis, _, size in pairs}


@dataclass(frozen=True)
class Reference:
    """The run on one process that rows are compared with; rows share it where they can.

    Attributes:
        task: ``"images"`` (encoder and language model) or ``"text"`` (language model alone).
        batch: samples per step.
        masks: which answer tokens count, see ``tasks.py``.
        tied: the language model's embedding is its head, too.
        freeze: what does not train, as the digits job's ``--freeze``.
        dtype: of weights and activations.
        experts: the language model's layers have experts, and the router's losses are on.
        images: which samples have any, see ``tasks.py``.
        layers: of the language model beside an encoder.
        varied: samples show one to four images, so their lengths differ.
        audio: a second encoder; each sample shows images, sounds, both or text alone.
        native: modules of transformers' own classes.
    """

    task: str
    batch: int
    masks: str = "uniform"
    tied: bool = False
    freeze: str = ""
    dtype: str = "float32"
    experts: bool = False
    images: str = "all"
    layers: int = 2
    varied: bool = False
    audio: bool = False
    native: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its file and of its line in the output."""
        parts = [self.task, f"{self.batch}samples", self.masks, self.dtype]
        parts += ["tied"] if self.tied else []
        parts += [f"frozen-{self.freeze}"] if self.freeze else []
        parts += ["experts"] if self.experts else []
        parts += [f"{self.images}-images"] if self.images != "all" else []
        parts += [f"{self.layers}layers"] if self.layers != 2 else []
        parts += ["varied"] if self.varied else []
        parts += ["audio"] if self.audio else []
        parts += [f"native-{name}" for name in self.native]
        return "reference-" + "-".join(parts)


@dataclass(frozen=True)
class Row:
    """One parallel run.

    Attributes:
        name: unique; what ``LAYOUTS`` chooses by.
        language: sizes of the language model's axes, such as ``"tp=2,cp=2,dp=2"``.
        vision: sizes of the encoder's axes; empty for the language model alone.
        audio: the same of a second encoder, for sounds; empty without.
        micro_batches: per step; 0 stands for the option ``MICRO_BATCHES``.
        masks, tied, freeze, dtype, experts, images, layers, varied, native: as in
            :class:`Reference`.
        sequence_parallel, distributed_optimizer, bridge, packed: as in the digits job.
        overlap: of the reduction of gradients and, with a distributed optimizer, of the gather of
            weights.
        virtual_stages: of the language model on each rank.
        encode_ahead: microbatches that are encoded together, for pipeline stages, 0 for all;
            without stages those that are encoded ahead.
        encode_in_bubbles: microbatches that are encoded in the bubbles of a pipeline.
        recompute: in both modules, as the digits job's option.
        encoder_memory, projector_memory: as the digits job's options.
    """

    name: str
    language: str
    vision: str = ""
    audio: str = ""
    micro_batches: int = 1
    masks: str = "uniform"
    tied: bool = False
    freeze: str = ""
    dtype: str = "float32"
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False
    bridge: str = "routed"
    packed: bool = False
    experts: bool = False
    images: str = "all"
    layers: int = 2
    virtual_stages: int = 1
    encode_ahead: int = 0
    encode_in_bubbles: int = 0
    recompute: str = "none"
    encoder_memory: str = "keep"
    projector_memory: str = "keep"
    varied: bool = False
    native: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Ranks that the row needs; ``ep`` and ``etp`` cut the same ones another way."""
        sizes = axis_sizes(self.language)
        return math.prod(size for axis, size in sizes.items() if axis not in ("ep", "etp"))

    def resolved_micro_batches(self, option: int) -> int:
        """Microbatches per step, with the option's value where the row leaves it open."""
        return self.micro_batches or option

    def reference(self, micro_batches: int) -> Reference:
        """What the row is compared with.

        Args:
            micro_batches: the option's value; text rows have four samples per microbatch, one
                for each DP rank of the widest layout.
        """
        text = not self.vision
        return Reference(
            task="text" if text else "images",
            batch=4 * micro_batches if text else 32,
            masks=self.masks,
            tied=self.tied,
            freeze=self.freeze,
            dtype=self.dtype,
            experts=self.experts,
            images=self.images,
            layers=self.layers,
            varied=self.varied,
            audio=bool(self.audio),
            native=self.native,
        )


def _text_rows() -> Iterator[Row]:
    """The language model alone, over pipeline stages too."""
    layouts = {
        "dp4": "tp=1,pp=1,dp=4",
        "tp4": "tp=4,pp=1,dp=1",
        "pp4": "tp=1,pp=4,dp=1",
        "dp2tp2": "tp=2,pp=1,dp=2",
        "dp2pp2": "tp=1,pp=2,dp=2",
        "tp2pp2": "tp=2,pp=2,dp=1",
        "dp2tp2pp2": "tp=2,pp=2,dp=2",
    }
    for (name, layout), tied in itertools.product(layouts.items(), (False, True)):
        yield Row(
            f"text-{name}-{'tied' if tied else 'untied'}",
            layout,
            micro_batches=0,
            tied=tied,
            masks="uneven",
            # Half of the rows each, so that every layout has both.
            distributed_optimizer=tied,
            sequence_parallel=not tied,
        )


FAN_IN = {"vision": "tp=2,dp=4", "language": "tp=2,cp=2,dp=2"}
FAN_OUT = {"vision": "tp=4,dp=2", "language": "tp=1,cp=2,dp=4"}
EQUAL = {"vision": "tp=2,dp=4", "language": "tp=2,dp=4"}
_FULL = {"sequence_parallel": True, "distributed_optimizer": True, "overlap": True}

_IMAGE_ROWS = (
    Row("fan-in-cp2", **FAN_IN),
    Row("fan-in-cp2-gather", **FAN_IN, masks="uneven", bridge="gather", **_FULL),
    Row("fan-in-cp2-4mb-uneven", **FAN_IN, micro_batches=4, masks="uneven"),
    Row("fan-in-cp2-sp-distopt", **FAN_IN, masks="uneven", **_FULL),
    Row("fan-in-cp1", "tp=4,dp=2", "tp=1,dp=8", micro_batches=4, masks="uneven"),
    Row("fan-in-cp4-sp", "tp=2,cp=4,dp=1", "tp=1,dp=8", masks="uneven", sequence_parallel=True),
    Row("fan-out-cp2", **FAN_OUT),
    Row("fan-out-cp2-gather", **FAN_OUT, masks="uneven", bridge="gather"),
    Row("fan-out-cp2-4mb-distopt", **FAN_OUT, micro_batches=4, masks="uneven", **_FULL),
    Row("fan-out-cp4", "tp=1,cp=4,dp=2", "tp=8,dp=1", masks="uneven"),
    Row("fan-out-cp1", "tp=1,dp=8", "tp=4,dp=2", distributed_optimizer=True),
    Row("equal-cp1", **EQUAL, masks="uneven"),
    Row("equal-cp2-sp", "tp=2,cp=2,dp=2", "tp=4,dp=2", masks="uneven", sequence_parallel=True),
    Row("equal-cp4-4mb-distopt", "tp=1,cp=4,dp=2", "tp=4,dp=2", micro_batches=4,
        distributed_optimizer=True),
    Row("packed-cp2-sp", **FAN_IN, masks="uneven", packed=True, sequence_parallel=True),
    Row("packed-cp4-4mb", "tp=2,cp=4,dp=1", "tp=1,dp=8", micro_batches=4, masks="uneven",
        packed=True),
    Row("packed-varied-cp2-sp", **FAN_IN, packed=True, varied=True, sequence_parallel=True),
    Row("packed-varied-fan-out-4mb", **FAN_OUT, micro_batches=4, masks="uneven", packed=True,
        varied=True, **_FULL),
    Row("packed-varied-cp4", "tp=2,cp=4,dp=1", "tp=1,dp=8", masks="uneven", packed=True,
        varied=True),
    Row("mixed-images-distopt", **FAN_IN, masks="uneven", images="mixed", **_FULL),
    Row("empty-on-some-ranks", **FAN_IN, masks="one_sample"),
    Row("empty-everywhere", **FAN_IN, masks="none"),
    Row("frozen-encoder", **FAN_IN, masks="uneven", freeze="encoder+projector"),
    Row("frozen-projector-only", **FAN_OUT, masks="uneven", freeze="encoder+language", **_FULL),
    Row("frozen-language", **FAN_IN, masks="uneven", freeze="language", **_FULL),
    Row("frozen-lower-encoder-gather", **FAN_OUT, micro_batches=4, masks="uneven",
        freeze="lower-encoder", bridge="gather"),
    Row("experts-ep4-4mb", "tp=1,cp=2,dp=4,ep=4", "tp=4,dp=2", micro_batches=4, masks="uneven",
        experts=True),
    Row("experts-ep4-etp1-sp-distopt", "tp=2,cp=2,dp=2,ep=4,etp=1", "tp=2,dp=4", masks="uneven",
        experts=True, **_FULL),
    Row("recompute-full", **FAN_IN, masks="uneven", recompute="full", **_FULL),
    Row("memory-recompute", **FAN_OUT, masks="uneven", encoder_memory="recompute",
        projector_memory="recompute", **_FULL),
    Row("memory-offload-4mb", **FAN_IN, micro_batches=4, masks="uneven", encoder_memory="offload",
        projector_memory="offload", overlap=True),
    Row("ahead-fan-in-4mb-mixed", **FAN_IN, micro_batches=4, masks="uneven", images="mixed",
        encode_ahead=1, **_FULL),
    Row("ahead-fan-out-4mb-gather", **FAN_OUT, micro_batches=4, masks="uneven", tied=True,
        bridge="gather", encode_ahead=2, overlap=True),
    Row("ahead-packed-varied-cp4-4mb-frozen", "tp=2,cp=4,dp=1", "tp=1,dp=8", micro_batches=4,
        masks="uneven", packed=True, varied=True, freeze="lower-encoder", encode_ahead=4),
    Row("ahead-memory-4mb", **FAN_OUT, micro_batches=4, masks="uneven", encoder_memory="offload",
        projector_memory="recompute", encode_ahead=1, overlap=True),
    Row("fp16", **FAN_OUT, masks="uneven", dtype="float16", **_FULL),
    Row("bf16", **FAN_IN, masks="uneven", dtype="bfloat16"),
)  # fmt: skip

# Pipeline stages of the language model beside an encoder on all ranks.
_STAGES = (
    Row("pp2-dp2-tp2", "tp=2,pp=2,dp=2", "tp=4,dp=2"),
    Row("pp2-cp2-dp2-4mb-mixed", "tp=1,cp=2,pp=2,dp=2", "tp=1,dp=8", micro_batches=4,
        masks="uneven", images="mixed", distributed_optimizer=True, overlap=True),
    Row("pp2-cp2-tp2-4mb-tied", "tp=2,cp=2,pp=2,dp=1", "tp=2,dp=4", micro_batches=4,
        masks="uneven", tied=True, **_FULL),
    Row("pp2-cp2-gather", "tp=1,cp=2,pp=2,dp=2", "tp=1,dp=8", micro_batches=4, masks="uneven",
        bridge="gather", encode_ahead=2, overlap=True),
    Row("pp2-cp2-fan-out-gather", "tp=1,cp=2,pp=2,dp=2", "tp=8,dp=1", micro_batches=4,
        masks="uneven", bridge="gather", tied=True),
    Row("pp4-cp2-4mb-ahead", "tp=1,cp=2,pp=4,dp=1", "tp=2,dp=4", micro_batches=4, masks="uneven",
        tied=True, layers=4, encode_ahead=1, overlap=True),
    Row("pp2-cp2-dp2-4mb-packed-varied", "tp=1,cp=2,pp=2,dp=2", "tp=1,dp=8", micro_batches=4,
        masks="uneven", images="mixed", packed=True, varied=True),
    Row("experts-pp2cp2-ep4", "tp=1,cp=2,pp=2,dp=2,ep=4", "tp=2,dp=4", micro_batches=4,
        masks="uneven", experts=True, **_FULL),
    Row("pp2-cp2-dp2-4mb-virtual", "tp=1,cp=2,pp=2,dp=2", "tp=2,dp=4", micro_batches=4,
        masks="uneven", tied=True, layers=4, virtual_stages=2, distributed_optimizer=True,
        overlap=True),
    Row("pp2-memory-offload-ahead-mixed", "tp=1,cp=2,pp=2,dp=2", "tp=2,dp=4", micro_batches=4,
        masks="uneven", images="mixed", encode_ahead=1, encoder_memory="offload",
        projector_memory="recompute", overlap=True),
    Row("pp2-memory-recompute-mixed", "tp=1,cp=2,pp=2,dp=2", "tp=2,dp=4", micro_batches=4,
        masks="uneven", images="mixed", encode_ahead=2, encoder_memory="recompute",
        projector_memory="offload", overlap=True),
    Row("pp2-cp2-dp2-4mb-bubbles-mixed", "tp=1,cp=2,pp=2,dp=2", "tp=1,dp=8", micro_batches=4,
        masks="uneven", images="mixed", encode_in_bubbles=2, overlap=True),
    Row("pp4-cp2-8mb-bubbles-frozen", "tp=1,cp=2,pp=4,dp=1", "tp=2,dp=4", micro_batches=8,
        masks="uneven", layers=4, freeze="encoder+projector", encode_in_bubbles=3, **_FULL),
)  # fmt: skip

# Two encoders, each on its own layout, beside one language model.
_SEVERAL_ENCODERS = (
    Row("several-encoders-fan-in-cp2", **FAN_IN, audio="tp=1,dp=8", masks="uneven"),
    Row("several-encoders-fan-out-and-in", **FAN_OUT, audio="tp=1,dp=8", masks="uneven", **_FULL),
    Row("several-encoders-pp2-4mb-ahead", "tp=1,cp=2,pp=2,dp=2", "tp=2,dp=4", "tp=1,dp=8",
        micro_batches=4, masks="uneven", encode_ahead=1, overlap=True),
    Row("several-encoders-4mb-ahead", **FAN_OUT, audio="tp=1,dp=8", micro_batches=4,
        masks="uneven", encode_ahead=1, **_FULL),
    Row("several-encoders-packed-varied-4mb", **FAN_IN, audio="tp=8,dp=1", micro_batches=4,
        masks="uneven", packed=True, varied=True, sequence_parallel=True, overlap=True),
    Row("several-encoders-equal-4mb-gather", "tp=1,cp=2,dp=4", "tp=2,dp=4", "tp=2,dp=4",
        micro_batches=4, masks="uneven", bridge="gather", overlap=True),
)  # fmt: skip


# Encoders that cut each item's sequence over CP ranks of their own.
_ENCODER_CP = (
    Row("encoder-cp2-fan-in", "tp=2,cp=2,dp=2", "tp=1,cp=2,dp=4", masks="uneven", **_FULL),
    Row("encoder-cp2-tp2-fan-out-4mb-mixed", "tp=1,cp=2,dp=4", "tp=2,cp=2,dp=2", micro_batches=4,
        masks="uneven", images="mixed", distributed_optimizer=True, overlap=True),
    Row("encoder-cp4-equal", "tp=2,cp=2,dp=2", "tp=1,cp=4,dp=2", masks="uneven"),
    Row("encoder-cp8-ranks-without-rows", "tp=1,dp=8", "tp=1,cp=8,dp=1", overlap=True),
    Row("encoder-cp2-packed-varied", "tp=2,cp=2,dp=2", "tp=1,cp=2,dp=4", masks="uneven",
        packed=True, varied=True, sequence_parallel=True, encoder_memory="recompute"),
    Row("encoder-cp2-pp2-4mb-ahead-mixed", "tp=1,cp=2,pp=2,dp=2", "tp=1,cp=2,dp=4",
        micro_batches=4, masks="uneven", images="mixed", encode_ahead=1, overlap=True),
    Row("encoder-cp2-beside-cp4-pp2", "tp=2,pp=2,dp=2", "tp=2,cp=2,dp=2", "tp=1,cp=4,dp=2",
        micro_batches=4, masks="uneven", recompute="full", distributed_optimizer=True),
)  # fmt: skip

# Modules of transformers' own classes, which PyTorch shards, beside Megatron's or each other.
_TORCH_NATIVE = (
    Row("torch-native-tower-tp2-beside-cp2", **FAN_IN, masks="uneven", native=("images",), **_FULL),
    Row("torch-native-tower-mixed-4mb-pp2", "tp=1,cp=2,pp=2,dp=2", "tp=2,dp=4", micro_batches=4,
        masks="uneven", images="mixed", native=("images",)),
    Row("torch-native-language-tp2-fsdp4", **EQUAL, masks="uneven", native=("language",),
        distributed_optimizer=True),
    Row("torch-native-both-tied-4mb-mixed", "tp=2,dp=4", "tp=4,dp=2", micro_batches=4, tied=True,
        masks="uneven", images="mixed", native=("images", "language")),
    Row("torch-native-both-cp2-4mb-mixed", **FAN_IN, micro_batches=4, masks="uneven",
        images="mixed", native=("images", "language")),
    Row("torch-native-both-cp2-4mb-ahead", **FAN_IN, micro_batches=4, masks="uneven",
        images="mixed", encode_ahead=1, native=("images", "language")),
    Row("torch-native-both-frozen-language", **EQUAL, masks="uneven", freeze="language",
        native=("images", "language")),
)  # fmt: skip


def _nightly_stages() -> Iterator[Row]:
    """Every cut of 8 ranks into stages of one size, beside two encoder layouts."""
    powers = (1, 2, 4, 8)
    for tp, cp, pp in itertools.product(powers, powers, (2, 4)):
        if tp * cp * pp > 8:
            continue
        dp = 8 // (tp * cp * pp)
        language = f"tp={tp},cp={cp},pp={pp},dp={dp}"
        for vision in ("tp=1,dp=8", "tp=4,dp=2"):
            name = f"stages-{vision}-{language}".replace("=", "").replace(",", "")
            layouts = {"language": language, "vision": vision, "layers": 4, "masks": "uneven"}
            yield Row(f"{name}-plain", **layouts)
            yield Row(f"{name}-mixed", **layouts, micro_batches=4, images="mixed", encode_ahead=2)
            yield Row(f"{name}-text", **layouts, micro_batches=4, images="none", overlap=True)
            yield Row(f"{name}-full", **layouts, micro_batches=4, tied=True, **_FULL)
            if pp == 2:
                yield Row(f"{name}-virtual", **layouts, micro_batches=4, tied=True,
                          images="mixed", virtual_stages=2)  # fmt: skip


def _nightly_rows() -> Iterator[Row]:
    """Every pair of 8-rank layouts, plain and with everything that may be on."""
    powers = (1, 2, 4, 8)
    visions = [(tp, 8 // tp) for tp in powers]
    languages = [
        (tp, cp, 8 // (tp * cp)) for tp, cp in itertools.product(powers, powers) if tp * cp <= 8
    ]
    for (v_tp, v_dp), (tp, cp, dp) in itertools.product(visions, languages):
        name = f"pair-tp{v_tp}dp{v_dp}-tp{tp}cp{cp}dp{dp}"
        layouts = {"vision": f"tp={v_tp},dp={v_dp}", "language": f"tp={tp},cp={cp},dp={dp}"}
        yield Row(f"{name}-plain", **layouts)
        full = {**layouts, "micro_batches": 4, "masks": "uneven", **_FULL}
        yield Row(f"{name}-full", **full)
        yield Row(f"{name}-gather", **full, bridge="gather")


def _nightly_expert_rows() -> Iterator[Row]:
    """Every language layout of 8 ranks with every EP of four experts, over TP and without."""
    sizes = [(tp, cp) for tp, cp in itertools.product((1, 2, 4), repeat=2) if tp * cp <= 8]
    for (tp, cp), ep in itertools.product(sizes, (1, 2, 4)):
        for etp in sorted({1, tp}):
            if 8 % (ep * etp) == 0:
                axes = f"tp={tp},cp={cp},dp={8 // (tp * cp)},ep={ep},etp={etp}"
                name = f"experts-tp{tp}cp{cp}-ep{ep}etp{etp}"
                full = _FULL if ep == 2 else {"sequence_parallel": True}
                yield Row(name, axes, "tp=2,dp=4", masks="uneven", experts=True, **full)
    full = {"micro_batches": 4, "masks": "uneven", "experts": True, **_FULL}
    yield Row("experts-pp2tp2-ep4etp1", "tp=2,cp=1,pp=2,dp=2,ep=4,etp=1", "tp=2,dp=4", **full)


DEFAULT_ROWS = (
    *_text_rows(),
    *_IMAGE_ROWS,
    *_STAGES,
    *_SEVERAL_ENCODERS,
    *_ENCODER_CP,
    *_TORCH_NATIVE,
)
NIGHTLY_ROWS = (
    *DEFAULT_ROWS,
    *_nightly_rows(),
    *_nightly_expert_rows(),
    *_nightly_stages(),
)


def choose(rows: Sequence[Row], patterns: Sequence[str]) -> tuple[Row, ...]:
    """The rows that names or shell patterns name, in the table's order; all without any.

    Raises:
        UnknownRowError: a pattern fits no row.
    """
    for pattern in patterns:
        if not fnmatch.filter([row.name for row in rows], pattern):
            known = ", ".join(row.name for row in rows)
            raise UnknownRowError(
                f"LAYOUTS names {pattern!r}, which is no row and fits none; the rows are {known}"
            )
    if not patterns:
        return tuple(rows)
    return tuple(r for r in rows if any(fnmatch.fnmatchcase(r.name, p) for p in patterns))
