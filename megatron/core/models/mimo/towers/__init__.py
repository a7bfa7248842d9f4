# SPDX-License-Identifier: Apache-2.0
"""Encoders of Megatron's layers that are the same functions as well-known models.

feature_transformer.py   layers whose output is chosen hidden states; ragged rows; SP
image_grids.py           where patches of images of different sizes stand: integers
qwen_vision.py           Qwen2.5-VL's and Qwen3-VL's: windows, merged rows, levels
sharded_list.py          lists of modules that checkpoints save one by one
vision.py                CLIP's and SigLIP's vision models (images), SigLIP2's (patches)
whisper.py               Whisper's encoder, and Qwen2-Audio's (sounds)
"""
