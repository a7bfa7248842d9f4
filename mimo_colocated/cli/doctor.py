# SPDX-License-Identifier: Apache-2.0
"""``mimo doctor``: what this machine has, one line each, and what to do about what it lacks.

It needs none of the extras, and nothing that it finds missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mimo_colocated._startup import SUPPORTED, SUPPORTED_TEXT
from mimo_colocated.cli.options import Parser
from mimo_colocated.launch.ranks import hush

OK, NOTE, BAD = "ok", "note", "BAD"
_SHARED_MEMORY = Path("/dev/shm")
_SHARED_MEMORY_NEEDED = 1 << 30
_EXTRAS = {
    "transformers": ("cli", "import, export and check"),
    "safetensors": ("cli", "import, export and check"),
    "jsonargparse": ("cli", "import, export and check"),
    "tqdm": ("cli", "import, export and check"),
    "pillow": ("train", "images of recipes"),
    "datasets": ("train", "tables of recipes"),
    "webdataset": ("train", "tar shards of recipes"),
    "tensorboard": ("train", "run.tensorboard of recipes"),
    "wandb": ("wandb", "run.wandb of recipes"),
    "rich": ("examples", "the examples"),
    "matplotlib": ("examples", "the examples"),
}


@dataclass(frozen=True)
class Line:
    """One thing of this machine.

    Attributes:
        what: it is.
        found: of it.
        state: ``OK``, ``NOTE`` for what can be done without, ``BAD``.
        cure: what to do, of all that is not ``OK``.
    """

    what: str
    found: str
    state: str = OK
    cure: str = ""


def run(argv: Sequence[str]) -> int:
    """Print the table.

    Args:
        argv: command line after ``mimo doctor``.

    Returns:
        0, or 1 if a line is bad.
    """
    parser = Parser(
        prog="mimo doctor",
        description="Say what this machine has, and what to do about what it lacks.",
    )
    parser.add_argument(
        "--folder",
        action="append",
        default=[],
        help="one that all ranks are to write into; may be given several times",
    )
    folders = parser.parse_args(list(argv)).folder
    lines = [line for check in CHECKS for line in _checked(check)]
    lines += [line for folder in folders for line in _checked(lambda f=folder: folder_lines(f))]
    print(table(lines))
    return int(any(line.state == BAD for line in lines))


def _checked(check: Callable[[], Iterator[Line]]) -> list[Line]:
    """The lines of a check; one that breaks is a line itself."""
    try:
        return list(check())
    except Exception as error:
        name = getattr(check, "__name__", "check").removesuffix("_lines").strip("_")
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return [Line(name, said[:200], BAD, "see the error")]


def table(lines: Sequence[Line]) -> str:
    """Return the lines as text: state, what, found, and the cure below what is not ok."""
    width = max(len(line.what) for line in lines)
    rows = []
    for line in lines:
        rows.append(f"{line.state:4}  {line.what:{width}}  {line.found}")
        if line.state != OK:
            rows.append(f"{'':6}{'':{width}}  -> {line.cure}")
    return "\n".join(rows)


def python_lines() -> Iterator[Line]:
    """The interpreter."""
    yield Line("python", platform.python_version())


def torch_lines() -> Iterator[Line]:
    """torch, its devices and its backends."""
    version = _version("torch")
    if version is None:
        yield Line("torch", "not installed", BAD, "pip install 'torch>=2.6'")
        return
    old = tuple(int(n) for n in version.split(".")[:2]) < (2, 6)
    yield Line("torch", version, BAD if old else OK, "pip install -U 'torch>=2.6'")
    import torch

    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    yield Line("devices", f"{names or 'no GPU'}; {cores} CPU cores")
    if _nvidia_driver() and not gpus:
        yield Line(
            "gpu",
            "the driver is there, but torch sees no GPU",
            BAD,
            "install a torch that is built for CUDA, or unset CUDA_VISIBLE_DEVICES",
        )
    backends = {"gloo": torch.distributed.is_gloo_available(), "nccl": _has_nccl()}
    there = [name for name, has in backends.items() if has]
    wanted = "nccl" if gpus else "gloo"
    state = OK if wanted in there else BAD
    cure = f"install a torch that is built with {wanted}"
    yield Line("backends", ", ".join(there) or "none", state, cure)


def _has_nccl() -> bool:
    import torch

    return torch.distributed.is_nccl_available() and torch.cuda.is_available()


def _nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").is_file()


def megatron_lines() -> Iterator[Line]:
    """Megatron-Core, and whether this project's modules are found in its place."""
    version = _version("megatron-core")
    cure = f"install a supported one: {SUPPORTED_TEXT}"
    if version is None:
        yield Line("megatron-core", "not installed", BAD, cure)
        return
    parts = tuple(int(n) for n in version.split("+")[0].split(".")[:3] if n.isdecimal())
    fits = any(low <= parts < high for low, high in SUPPORTED)
    yield Line("megatron-core", version, OK if fits else BAD, cure)
    hush()
    spec = importlib.util.find_spec("megatron.core.models.mimo")
    place = Path(spec.origin).parent if spec and spec.origin else Path()
    ours = (place / "huggingface").is_dir()
    yield Line(
        "mimo modules",
        str(place) if ours else f"stock's are found, in {place}",
        OK if ours else BAD,
        "the start-up hook is not at work: pip install megatron-mimo-colocated in this "
        "environment, and start python without -S and -I",
    )


def te_lines() -> Iterator[Line]:
    """What of Transformer Engine is usable."""
    version = _version("transformer-engine")
    if version is None:
        yield Line(
            "transformer engine",
            "not installed: Megatron's local layers are used",
            NOTE,
            "on GPUs: pip install 'megatron-mimo-colocated[te]'",
        )
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        yield Line(
            "transformer engine",
            f"{version} cannot be imported: {type(error).__name__}",
            BAD,
            "install one built for this torch and CUDA, or uninstall it",
        )
        return
    import torch

    if not torch.cuda.is_available():
        yield Line("transformer engine", f"{version}; its layers need a GPU", NOTE, "use a GPU")
        return
    capability = torch.cuda.get_device_capability()
    fp8 = "fp8 too" if capability >= (8, 9) else "no fp8: it needs compute capability 8.9"
    yield Line("transformer engine", f"{version}: layers, fused attention, {fp8}")


def memory_lines() -> Iterator[Line]:
    """Shared memory, which NCCL and loaders' workers use."""
    if not _SHARED_MEMORY.is_dir():
        yield Line("shared memory", f"no {_SHARED_MEMORY}", BAD, "mount a tmpfs there")
        return
    size = shutil.disk_usage(_SHARED_MEMORY).total
    state = OK if size >= _SHARED_MEMORY_NEEDED else BAD
    cure = "start the container with --shm-size=8g (or --ipc=host)"
    yield Line("shared memory", f"{_SHARED_MEMORY} has {_gib(size)}", state, cure)


def extra_lines() -> Iterator[Line]:
    """What the extras bring."""
    for name, (extra, use) in _EXTRAS.items():
        version = _version(name)
        cure = f"pip install 'megatron-mimo-colocated[{extra}]'"
        missing = f"not installed; {use} need it" if version is None else version
        yield Line(name, missing, OK if version else NOTE, cure)


def folder_lines(folder: str) -> Iterator[Line]:
    """Whether checkpoints and exports can be written into a folder; nothing is left there."""
    what, path = "folder", Path(folder).expanduser()
    if not path.is_dir():
        yield Line(what, f"{path} is not there", BAD, f"make it: mkdir -p {path}")
        return
    try:
        problem = _try_folder(path)
    except OSError as error:
        reason = error.strerror or str(error)
        yield Line(what, f"{path} cannot be written: {reason}", BAD, "change its permissions")
        return
    if problem:
        yield Line(what, f"{path}: {problem}", BAD, "use a file system that can (NFS 4, Lustre)")
        return
    yield Line(what, f"{path}: {_gib(shutil.disk_usage(path).free)} free; writes, locks, renames")
    yield Line(
        what,
        f"{path} on {platform.node()}",
        NOTE,
        "with several machines, run this on each: all must see one folder (a job checks it)",
    )


def _try_folder(path: Path) -> str:
    """Do what a save does; return what does not work."""
    import fcntl

    with tempfile.TemporaryDirectory(dir=path, prefix=".mimo-doctor-") as scratch:
        file = Path(scratch, "a")
        with file.open("wb") as out:
            out.write(b"x")
            out.flush()
            os.fsync(out.fileno())
            try:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return "files cannot be locked"
        Path(scratch, "b").mkdir()
        os.rename(Path(scratch, "b"), Path(scratch, "c"))
        if not Path(scratch, "c").is_dir():
            return "a renamed folder is not seen"
    return ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


CHECKS = (python_lines, torch_lines, megatron_lines, te_lines, memory_lines, extra_lines)
"""In the order of the table."""
