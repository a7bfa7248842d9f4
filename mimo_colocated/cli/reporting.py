# SPDX-License-Identifier: Apache-2.0
"""``mimo report``: the page of a run, also of one that is under way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mimo_colocated.launch.errors import JobError


def run(options: Any) -> None:
    """Write the page and say where it is.

    Args:
        options: of ``mimo report``.

    Raises:
        JobError: there is no run, the page cannot be written, or a package is missing.
    """
    try:
        from mimo_colocated.train.report import write_report
    except ModuleNotFoundError as error:
        raise JobError(
            f"a report needs {error.name}; pip install 'megatron-mimo-colocated[train]'"
        ) from None
    print(f"wrote {write_report(Path(options.run).expanduser())}")
