# SPDX-License-Identifier: Apache-2.0
"""One file per kind of model: how a configuration is read, and the table of its weights."""
