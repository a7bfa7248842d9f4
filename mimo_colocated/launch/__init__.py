# SPDX-License-Identifier: Apache-2.0
"""Start the ranks of a job, and say in one sentence what went wrong with them.

A script describes its job and ends in one call; it runs on this machine without torchrun, or as a
rank under torchrun:

    def work(options, backend):
        init_distributed(backend, options.timeout)
        ...

    if __name__ == "__main__":
        sys.exit(run(Job(__file__, parse, work), sys.argv[1:]))

What it gives: a rank per GPU over NCCL or ranks on the CPU over gloo; one line for the user where
eight ranks fail, with the whole traceback in a file below ``OUT/errors``; the name of a rank that
was killed or stopped, and who waited for it; signals that let the job save before it ends.

    launcher.py          ``run``: the process that the user starts
    ranks.py             what happens in each rank around the job; ``init_distributed``
    starts.py            how ranks become processes: forked on the CPU, PyTorch's agent with GPUs
    failures.py          which rank failed first, and why: from exit codes and reports to a sentence
    lost_ranks.py        a rank that is killed or stopped
    stopping.py          signals to the launcher and to the ranks
    errors.py            errors that a user reads; files that are whole or not there
    options.py           options: one frozen dataclass, parsed by argparse
    training_options.py  those that every training job has; layouts.py and freezing.py read theirs
    connection_notes.py  gloo's own lines on refused connections

Importing it loads no torch: a wrong option is said before anything heavy starts.
"""

from mimo_colocated.launch.errors import JobError, Packages, Stopped, write_atomically, writing
from mimo_colocated.launch.launcher import Job, JobOptions, choose_backend, run
from mimo_colocated.launch.ranks import hush, init_distributed

__all__ = [
    "Job",
    "JobError",
    "JobOptions",
    "Packages",
    "Stopped",
    "choose_backend",
    "hush",
    "init_distributed",
    "run",
    "write_atomically",
    "writing",
]
