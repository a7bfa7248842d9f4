# SPDX-License-Identifier: Apache-2.0
"""``mimo train``: a recipe, which is a YAML file, becomes a run.

    command.py     the command line: which recipe, what is set, on which ranks
    recipe.py      the fields of a recipe
    reading.py     YAML and ``--set`` into a recipe; misspelt fields are refused by name
    recipes/       those that ship
    programs.py    recipes of jobs that bring a model and data of their own, such as digits
    makers.py      models that a recipe has made before it trains them
    joining.py     two folders into one model
    plan.py        ``--dry-run``: layouts, groups, memory and the torchrun line
    record.py      what is left beside a run: the whole recipe, versions, git state
    data.py        the recipe's data, prepared, and the batches of this rank
    stages.py      a run that begins with the weights of another one
    trainer.py     steps over those batches
    numbers.py     the work of a step: FLOPs by module, rate, what would be repeated
    reporting.py   what is told of every step
    report.py      the page of a run; report_figures.py draws what stands on it
    answers.py     answers token by token, and whether they are right
    evaluation.py  held-out loss and exact match
    job.py         one rank: build, train, evaluate, export

Importing it loads no torch.
"""
