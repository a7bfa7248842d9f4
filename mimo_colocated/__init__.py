# SPDX-License-Identifier: Apache-2.0
"""Colocated multimodal training for Megatron-Core: the install side of the project.

The code that users import lives under two Megatron-Core names,
``megatron.core.hyper_comm_grid`` and ``megatron.core.models.mimo``. This package carries the
start-up hook that makes those names resolve to this project, and what both names are built on
(``process_groups``).
"""

__version__ = "0.1.0"
