# SPDX-License-Identifier: Apache-2.0
"""Models from Hugging Face folders, in any layouts, and back.

build.py           ``from_folder``: a folder and a layout per module -> a model with its weights
composites.py      what a whole model is made of
own_encoders.py    any tower of transformers beside a language model's folder
families/          one file per kind of model: its configuration, the table of its weights
tables.py          name patterns <-> name patterns, and the kind of cut
cuts.py            which elements of which tensors a rank holds: pure integers
weights.py         a rank's parameters: checked against the folder, then read
folder.py          a folder: configuration, tensors by name, whatever else lies in it
export.py          ``to_folder``: the model back into a folder, tensor by tensor
pieces.py          which rank has which part of a folder's tensors
target.py          where a folder is written until it is whole
safetensors_file.py  writes a file tensor by tensor
logits_check.py    logits against transformers', on samples that examples.py makes
family.py          what a family says; what it refuses
language_model.py  stock's GPT with their rotary frequencies and a padded vocabulary
plan_shapes.py     sizes of a folder's model, for planning layouts
trained.py         what of it trains under a recipe, for planning, too
rotary.py          rotary frequencies of a configuration
"""
