# SPDX-License-Identifier: Apache-2.0
"""``mimo train`` whose ranks write down what they compute on, and stop or die where they are told.

Run by ``torchrun``, or as it would; arguments are those of ``mimo``. In the environment:

* ``RECORD_TO``: a folder; ``RANK.txt`` gets a line per sample and step: step, digest of its tokens.
* ``STOP_IN``: every rank tells itself to stop, in the step of this number (from 1).
* ``DIE_IN``: rank 1 is killed in the step of this number, unless torchrun has started it again.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path

import numpy as np

from megatron.core.models.mimo.data.arrays import LanguageArrays
from mimo_colocated.cli.main import main
from mimo_colocated.train.data import StepData


def digest(ids: np.ndarray) -> str:
    """What tells a sample from others, by its tokens."""
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest()[:16]


def samples(language: LanguageArrays) -> list[str]:
    """The digests of a replica's samples."""
    if language.padded is None:
        rows = list(language.input_ids)
    else:
        starts = (np.cumsum(language.padded) - language.padded).tolist()
        rows = [language.input_ids[0, start:] for start in starts]
    return [digest(row[:count]) for row, count in zip(rows, language.lengths, strict=True)]


def record() -> None:
    """Let ranks write down what the trainer takes, when it takes it."""
    rank, file = os.environ["RANK"], Path(os.environ["RECORD_TO"], f"{os.environ['RANK']}.txt")
    take, done = StepData.at, set()

    def taken(self: StepData, step: int) -> object:
        made = take(self, step)
        if step not in done:
            done.add(step)
            found = [each for micro in made.microbatches for each in samples(micro.language)]
            with file.open("a") as lines:
                lines.writelines(f"{step + 1} {each}\n" for each in found)
            if str(step + 1) == os.environ.get("STOP_IN"):
                os.kill(os.getpid(), signal.SIGUSR1)
            again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
            if (rank, str(step + 1)) == ("1", os.environ.get("DIE_IN")) and not again:
                os.kill(os.getpid(), signal.SIGKILL)
        return made

    StepData.at = taken  # type: ignore[method-assign]


if __name__ == "__main__":
    record()
    sys.exit(main(sys.argv[1:]))
