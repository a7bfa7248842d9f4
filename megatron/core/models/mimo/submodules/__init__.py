# SPDX-License-Identifier: Apache-2.0
"""The modules of one modality: encoders, decoders and projections."""
