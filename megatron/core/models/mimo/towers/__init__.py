# SPDX-License-Identifier: Apache-2.0
"""Encoders of Megatron's layers that are the same functions as well-known models.

feature_transformer.py   layers whose output is chosen hidden states; ragged rows; SP
vision.py                CLIP's and SigLIP's vision models (images), SigLIP2's (patches)
whisper.py               Whisper's encoder, and Qwen2-Audio's (sounds)
"""
