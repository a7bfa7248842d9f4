# SPDX-License-Identifier: Apache-2.0
"""Build hook: what the wheel holds besides ``mimo_colocated``.

A wheel carries the modules as data of ``mimo_colocated`` (``_overlay/core/…``), never as files
under ``megatron/``, so installing and uninstalling it cannot touch a file of ``megatron-core``. An
editable install carries the start-up ``.pth`` only; the modules are those of the checkout.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_STARTUP = {"mimo_colocated/megatron_mimo_colocated.pth": "megatron_mimo_colocated.pth"}
_OVERLAY = {
    "megatron/core/hyper_comm_grid.py": "mimo_colocated/_overlay/core/hyper_comm_grid.py",
    "megatron/core/models/mimo": "mimo_colocated/_overlay/core/models/mimo",
}


class OverlayHook(BuildHookInterface):
    """Adds the ``.pth`` to every kind of wheel and the modules to the standard one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it writes a wheel; ``version`` is the kind of wheel."""
        if version == "editable":
            build_data["force_include_editable"].update(_STARTUP)
        else:
            build_data["force_include"].update({**_STARTUP, **_OVERLAY})
