# SPDX-License-Identifier: Apache-2.0
"""Mistakes in what Megatron's modules see in place of torch's CUDA functions."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_VIEW = MIMO + "stock_view.py"
_TESTS = UNIT + "test_cpu_backend.py::"

BACKEND = (
    Mutant(
        name="modules-loaded-later-are-forgotten",
        file=_VIEW,
        old="            execute(module)\n            self.change(module)",
        new="            execute(module)",
        tests=(_TESTS + "test_cuda_keeps_tensors_and_modules",),
        why="stock modules that are imported after the package ask for a GPU and fail",
    ),
    Mutant(
        name="functions-of-before-the-import",
        file=MIMO + "cpu_backend.py",
        old="return getattr(owner, name)(*args, **kwargs)",
        new="return call.__wrapped__(*args, **kwargs)",
        tests=(_TESTS + "test_megatron_uses_what_others_put_in_place_of_torchs_functions",),
        why="Megatron's modules go round accelerate's and other tools' replacements of torch.zeros",
    ),
    Mutant(
        name="compiled-functions-stay",
        file=_VIEW,
        old="setattr(space, name, plain)",
        new="pass",
        tests=(_TESTS + "test_functions_that_were_compiled_already_are_made_plain",),
        why="the first step on a CPU needs a C++ compiler",
    ),
)
