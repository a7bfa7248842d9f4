# SPDX-License-Identifier: Apache-2.0
"""Host memory of an import and an export, per rank, on a model made up on the disk.

    python -m benchmarks.streaming --folder /big/disk --tp 1 4

writes a Llama of 1.65e9 random parameters in bfloat16 there (3.3 GB, once), imports it and exports
it again (3.3 GB more, removed), and prints for each number of ranks the largest peak of any rank
over what it had before, beside the bound: its own shard and twice the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mimo_colocated.launch import Job, hush, init_distributed, run
from mimo_colocated.launch.layouts import Layout

HIDDEN, MLP, LAYERS, HEADS, GROUPS, VOCABULARY = 2048, 8192, 22, 16, 8, 65_536
TENSORS_PER_FILE = 40


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


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors."""
    head = HIDDEN // HEADS
    layer = {
        "input_layernorm.weight": (HIDDEN,),
        "mlp.down_proj.weight": (HIDDEN, MLP),
        "mlp.gate_proj.weight": (MLP, HIDDEN),
        "mlp.up_proj.weight": (MLP, HIDDEN),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.k_proj.weight": (GROUPS * head, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.v_proj.weight": (GROUPS * head, HIDDEN),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for n in range(LAYERS):
        found |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return {**found, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make(folder: Path) -> None:
    """Write the model, a tensor at a time."""
    import torch
    from transformers import LlamaConfig

    from megatron.core.models.mimo.huggingface.folder import INDEX, Described
    from megatron.core.models.mimo.huggingface.safetensors_file import SafetensorsFile

    folder.mkdir(parents=True)
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        vocab_size=VOCABULARY,
        dtype="bfloat16",
    ).save_pretrained(folder)
    drawn = torch.randn(1 << 20).bfloat16()
    names, weight_map = list(shapes()), {}
    count = -(-len(names) // TENSORS_PER_FILE)
    for number in range(count):
        own = names[number * TENSORS_PER_FILE : (number + 1) * TENSORS_PER_FILE]
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        described = {name: Described(file, torch.bfloat16, shapes()[name]) for name in own}
        out = SafetensorsFile(folder / file, described, {"format": "pt"})
        for at, name in enumerate(own):
            size = described[name].size // 2
            # Rolled, so that no two tensors are the same.
            values = drawn.roll(at + 1).repeat(-(-size // len(drawn)))[:size]
            out.write(values.reshape(described[name].shape))
            weight_map[name] = file
        out.close()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


class Peak:
    """Resident memory of this process over what it was."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self._before = self._status("VmRSS")

    def bytes(self) -> int:
        """Return the largest so far."""
        return self._status("VmHWM") - self._before

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def work(options: Options, backend: str) -> None:
    """Import, export, compare, on one rank."""
    import torch
    import torch.distributed as dist

    hush()
    from megatron.core.models.mimo.huggingface.build import BuildOptions, from_folder
    from megatron.core.models.mimo.huggingface.export import to_folder
    from megatron.core.models.mimo.huggingface.weights import gathered

    init_distributed(backend, 1800)
    source, target = options.folder / "model", options.folder / "exported"
    settings = BuildOptions(dtype=torch.bfloat16, freeze=lambda model: model.requires_grad_(False))
    peak, reading, start = Peak(), [0], time.monotonic()

    def tick(_size: int) -> None:
        reading[0] = peak.bytes()

    built = from_folder(source, {"language": Layout(tp=dist.get_world_size())}, settings, tick=tick)
    imported = time.monotonic() - start
    shard = sum(p.numel() * p.element_size() for p in built.model.parameters())
    dist.barrier()
    peak, start = Peak(), time.monotonic()
    to_folder(built, target, overwrite=True)
    said = gathered((reading[0], shard, peak.bytes(), imported, time.monotonic() - start))
    if dist.get_rank() == 0:
        print(row(said), flush=True)
        same = [compare(path, target / path.name) for path in sorted(source.glob("*.safetensors"))]
        print(f"files of weights: {sum(same)} of {len(same)} byte-equal", flush=True)
        shutil.rmtree(target)
    dist.barrier()


def row(said: Sequence[tuple[int, int, int, float, float]]) -> str:
    """A line of the table: the worst rank's."""
    largest = 2 * VOCABULARY * HIDDEN
    reading = max(said, key=lambda each: each[0] - each[1])
    writing = max(each[2] for each in said)
    mb = [reading[0], reading[1] + 2 * largest, writing, 2 * largest]
    cells = [f"{len(said)} ranks", *(f"{value / 1e6:.0f} MB" for value in mb)]
    cells += [f"{max(each[at] for each in said):.0f} s" for at in (3, 4)]
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
        make(options.folder / "model")
    print("| ranks | import | own shard + 2 x largest | export | 2 x largest | s | s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    return max(run(JOB, [str(options.folder), str(ranks)]) for ranks in options.tp)


if __name__ == "__main__":
    import os

    sys.exit(run(JOB, sys.argv[1:]) if "RANK" in os.environ else main())
