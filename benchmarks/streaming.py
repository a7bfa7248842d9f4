# SPDX-License-Identifier: Apache-2.0
"""Host memory of an import and an export, per rank, on a model made up on the disk.

    python -m benchmarks.streaming --folder /big/disk --tp 1 4

writes a Llama of 1.65e9 random parameters in bfloat16 there (3.3 GB, once), imports it and exports
it again (3.3 GB more, removed), and prints for each number of ranks the largest peak of any rank
over what it had before, beside the bound: its own shard and twice the largest tensor. It fails
above the bound, and when a file comes back otherwise than it was.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mimo_colocated.launch import Job, JobError, hush, init_distributed, run
from mimo_colocated.launch.layouts import Layout

SLACK = 64 << 20
"""Bytes above the bound that are no weights: 40 MB of libraries that are loaded on first use, and
objects of Python, buffers of gloo and of files."""


@dataclass(frozen=True)
class Sizes:
    """A Llama.

    Attributes:
        hidden, mlp, layers, heads, groups, vocabulary: of its configuration.
        tensors_per_file: how its folder is cut.
    """

    hidden: int = 2048
    mlp: int = 8192
    layers: int = 22
    heads: int = 16
    groups: int = 8
    vocabulary: int = 65_536
    tensors_per_file: int = 40

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor in bfloat16."""
        return 2 * self.hidden * max(self.vocabulary, self.mlp)


@dataclass(frozen=True)
class Measured:
    """Of one rank, in bytes and seconds.

    Attributes:
        reading, writing: peak of the import, of the export, over what was there before.
        shard: of the weights.
        reading_s, writing_s: how long they took.
    """

    reading: int
    shard: int
    writing: int
    reading_s: float
    writing_s: float


@dataclass(frozen=True)
class Options:
    """What the launcher wants to know.

    Attributes:
        folder: where the model lies.
        world_size: tensor-parallel ranks.
    """

    folder: Path
    world_size: int
    backend: str = "gloo"

    @property
    def out(self) -> Path:
        """Where errors go."""
        return Path(tempfile.gettempdir()) / "mimo" / "streaming"


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors."""
    wide, mlp = sizes.hidden, sizes.mlp
    narrow = sizes.groups * (wide // sizes.heads)
    layer = {
        "input_layernorm.weight": (wide,),
        "mlp.down_proj.weight": (wide, mlp),
        "mlp.gate_proj.weight": (mlp, wide),
        "mlp.up_proj.weight": (mlp, wide),
        "post_attention_layernorm.weight": (wide,),
        "self_attn.k_proj.weight": (narrow, wide),
        "self_attn.o_proj.weight": (wide, wide),
        "self_attn.q_proj.weight": (wide, wide),
        "self_attn.v_proj.weight": (narrow, wide),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocabulary, wide)}
    for n in range(sizes.layers):
        found |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return {**found, "model.norm.weight": (wide,), "lm_head.weight": (sizes.vocabulary, wide)}


def make(folder: Path, sizes: Sizes) -> None:
    """Write the model, a tensor at a time."""
    import torch
    from transformers import LlamaConfig

    from megatron.core.models.mimo.huggingface.folder import INDEX, Described
    from megatron.core.models.mimo.huggingface.safetensors_file import SafetensorsFile

    folder.mkdir(parents=True)
    LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.groups,
        vocab_size=sizes.vocabulary,
        dtype="bfloat16",
    ).save_pretrained(folder)
    drawn = torch.randn(1 << 20).bfloat16()
    shape_of, each = shapes(sizes), sizes.tensors_per_file
    names, weight_map = list(shape_of), {}
    count = -(-len(names) // each)
    for number in range(count):
        own = names[number * each : (number + 1) * each]
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        described = {name: Described(file, torch.bfloat16, shape_of[name]) for name in own}
        out = SafetensorsFile(folder / file, described, {"format": "pt"})
        for at, name in enumerate(own):
            size = described[name].size // 2  # elements
            # Rolled, so that no two tensors are the same.
            values = drawn.roll(at + 1).repeat(-(-size // len(drawn)))[:size]
            out.write(values.reshape(described[name].shape))
            weight_map[name] = file
        out.close()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


class Peak:
    """Resident memory of this process over what it was."""

    def __init__(self) -> None:
        # Memory that is free within the process would be taken first, and not be counted.
        gc.collect()
        with contextlib.suppress(AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self._before = self._status("VmRSS")

    def bytes(self) -> int:
        """Return the largest so far."""
        return self._status("VmHWM") - self._before

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def measure(folder: Path, sizes: Sizes) -> list[Measured]:
    """Import and export a model, on all ranks of the default process group.

    Args:
        folder: with the model as ``model``.
        sizes: of it.

    Returns:
        What each rank has measured, on every rank.

    Raises:
        JobError: above the bound, or a file came back otherwise; the same on all ranks.
    """
    import torch
    import torch.distributed as dist

    from megatron.core.models.mimo.huggingface.build import BuildOptions, from_folder
    from megatron.core.models.mimo.huggingface.export import to_folder
    from megatron.core.models.mimo.huggingface.weights import gathered

    source, target = folder / "model", folder / "exported"
    settings = BuildOptions(dtype=torch.bfloat16, freeze=lambda model: model.requires_grad_(False))
    peak, reading, start = Peak(), [0], time.monotonic()

    def tick(_size: int) -> None:
        reading[0] = peak.bytes()

    built = from_folder(source, {"language": Layout(tp=dist.get_world_size())}, settings, tick=tick)
    reading_s = time.monotonic() - start
    shard = sum(p.numel() * p.element_size() for p in built.model.parameters())
    dist.barrier()
    peak, start = Peak(), time.monotonic()
    to_folder(built, target, overwrite=True)
    own = Measured(reading[0], shard, peak.bytes(), reading_s, time.monotonic() - start)
    built.destroy()
    problems = [] if dist.get_rank() else changed(source, target)
    told = gathered((own, problems))
    found = [each for each, _ in told]
    if wrong := [*told[0][1], *too_much(found, sizes.largest)]:
        raise JobError("; ".join(wrong))
    return found


def changed(source: Path, target: Path) -> list[str]:
    """Say which files of weights came back otherwise, and remove the export."""
    paths = sorted(source.glob("*.safetensors"))
    wrong = [path.name for path in paths if not compare(path, target / path.name)]
    shutil.rmtree(target)
    return [f"files of weights came back otherwise: {wrong} of {len(paths)}"] if wrong else []


def too_much(found: Sequence[Measured], largest: int) -> list[str]:
    """Say which ranks took more than the bound.

    Args:
        found: of each rank.
        largest: bytes of the largest tensor.
    """
    problems = []
    for rank, each in enumerate(found):
        bounds = {
            "import": (each.reading, each.shard + 2 * largest),
            "export": (each.writing, 2 * largest),
        }
        problems += [
            f"rank {rank} took {took / 1e6:.0f} MB for the {what}, bound {bound / 1e6:.0f} MB and "
            f"{SLACK / 1e6:.0f} MB that are no weights"
            for what, (took, bound) in bounds.items()
            if took > bound + SLACK
        ]
    return problems


def work(options: Options, backend: str) -> None:
    """Measure, on one rank."""
    import torch.distributed as dist

    hush()
    init_distributed(backend, 1800)
    found = measure(options.folder, Sizes())
    if dist.get_rank() == 0:
        print(row(found, Sizes().largest), flush=True)


def row(found: Sequence[Measured], largest: int) -> str:
    """A line of the table: the worst rank's."""
    reading = max(found, key=lambda each: each.reading - each.shard)
    writing = max(each.writing for each in found)
    mb = [reading.reading, reading.shard + 2 * largest, writing, 2 * largest]
    cells = [f"{len(found)} ranks", *(f"{value / 1e6:.0f} MB" for value in mb)]
    cells += [f"{max(each.reading_s for each in found):.0f} s"]
    cells += [f"{max(each.writing_s for each in found):.0f} s"]
    return f"| {' | '.join(cells)} |"


def compare(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes."""
    with one.open("rb") as first, other.open("rb") as second:
        while True:
            a, b = first.read(1 << 24), second.read(1 << 24)
            if a != b:
                return False
            if not a:
                return True


def parse(argv: Sequence[str], world: int | None) -> Options:
    """Read what :func:`main` gives to the ranks."""
    return Options(Path(argv[0]), int(argv[1]))


JOB = Job(__file__, parse, work)


def main() -> int:
    """Make the model if it is not there, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="needs 7 GB of room")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 4], help="numbers of ranks")
    options = parser.parse_args()
    if not (options.folder / "model").is_dir():
        make(options.folder / "model", Sizes())
    print("| ranks | import | own shard + 2 x largest | export | 2 x largest | s | s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    return max(run(JOB, [str(options.folder), str(ranks)]) for ranks in options.tp)


if __name__ == "__main__":
    import os

    sys.exit(run(JOB, sys.argv[1:]) if "RANK" in os.environ else main())
