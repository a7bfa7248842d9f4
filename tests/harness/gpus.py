# SPDX-License-Identifier: Apache-2.0
"""Which tests see GPUs, decided before torch is imported.

A GPU that is visible makes stock Megatron-Core build its modules there, and tests over gloo have
CPU tensors. So GPUs are visible only to the ranks of a launch that has one for each of them; the
process that runs the tests of one process never sees any.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import MutableMapping

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Ranks share the GPUs that are there, over gloo, where there is not one for each.
SHARED = "MIMO_TESTS_SHARE_GPUS"
# What VISIBLE was before GPUs were hidden: "all" where it was not set.
BEFORE = "MIMO_TESTS_CUDA_VISIBLE_DEVICES"


def installed() -> int:
    """GPUs of this machine, as the driver lists them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False).stdout
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def visible(env: MutableMapping[str, str]) -> int:
    """GPUs that a program with this environment sees."""
    if VISIBLE not in env:
        return installed()
    names = [name.strip() for name in env[VISIBLE].split(",")]
    ends = [at for at, name in enumerate(names) if name in ("", "-1")]
    return min(len(names[: ends[0]] if ends else names), installed())


def hide(env: MutableMapping[str, str]) -> None:
    """Let what is started with this environment see no GPU."""
    env.setdefault(BEFORE, env.get(VISIBLE, "all"))
    env[VISIBLE] = ""


def show_to_ranks(env: MutableMapping[str, str], world_size: int) -> bool:
    """Show the GPUs again to the ranks of a launch if there is one for each; True if so.

    Where they are to be shared (``SHARED``), one at all is enough.
    """
    shown = dict(env)
    before = shown.pop(BEFORE, env.get(VISIBLE, "all"))
    if before == "all":
        shown.pop(VISIBLE, None)
    else:
        shown[VISIBLE] = before
    if visible(shown) < (1 if env.get(SHARED) else world_size):
        hide(env)
        return False
    env.pop(VISIBLE, None)
    env.update({k: v for k, v in shown.items() if k == VISIBLE})
    return True


def prepare(env: MutableMapping[str, str]) -> None:
    """Decide for this process, whose environment this is: a rank of a launch or not."""
    if "WORLD_SIZE" in env:
        show_to_ranks(env, int(env["WORLD_SIZE"]))
    else:
        hide(env)
