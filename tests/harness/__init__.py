# SPDX-License-Identifier: Apache-2.0
"""Runs tests marked ``@pytest.mark.ranks(n)`` on ``n`` processes.

Under plain ``pytest`` all tests of one ``n`` share one launch and each is reported with its own
outcome; under ``torchrun --nproc-per-node n -m pytest`` they run directly.

    plugin.py      hooks; picks the side: supervising pytest, or pytest on a rank
    programs.py    programs that tests run as a user does, forked from it too
    gpus.py        who sees GPUs, decided before torch is imported
    supervisor.py  supervising side: starts launches, follows them, settles every test
    fork_server.py starts ranks and programs in forks of a process that has the libraries
    reports.py     supervising side: reports of n ranks -> the reports of one test
    rank_plugin.py rank side: process group, lockstep after each test, deadline, output
    worker_plugin.py  a second process for tests of one process: what they say, into records
    records.py     files in which the ranks tell the supervisor what happened
    backend.py     which torch.distributed backend and device the tests use
"""
