# SPDX-License-Identifier: Apache-2.0
"""The ``mimo`` command: models from Hugging Face folders and back, checks, and the machine.

    main.py      which command; what ranks run
    options.py   options of all commands, read from the command line or a YAML file
    models.py    folder and layouts: what can be said before ranks start
    importing.py, exporting.py, checking.py, evaluating.py, generating.py   one rank of a command
    ready_models.py           a model with weights: a folder, or what a run trained from one
    planning.py, drawing.py   commands that start no ranks; plan_table.py: what the first prints;
    planned_recipe.py         recipes and the planner
    doctor.py    what this machine has; needs none of the extras
    progress.py  a bar for what takes long

Importing it loads no torch.
"""
