# SPDX-License-Identifier: Apache-2.0
"""A vision-language model that learns to read handwritten digits, and with ``--audio`` spoken ones.

    train.py        the script: options, what ranks need, one rank's work
    options.py      the options that other jobs do not have
    images.py       scikit-learn's digits, cut into patches
    sounds.py       spoken digits, and their spectra
    data.py         batches: a pure function of (seed, step), whatever the layout
    model.py        two small encoders and a small GPT, joined by ``MimoModel``
    job.py          a rank's job: build, train, read the held-out digits, report
    predictions.py  what the model read, and its plot
    memory_plan.py  ``--memory-plan``

All else is the library's: ``mimo_colocated.launch`` and ``megatron.core.models.mimo.job``.
"""

from mimo_colocated.launch.errors import Packages

INSTALL_HINT = "install what the examples need with: pip install '.[examples]'"
"""Said wherever a package is missing; run from the root of the project."""

PACKAGES = Packages(
    {
        "torch": "torch",
        "numpy": "numpy",
        "sklearn": "scikit-learn",
        "captcha": "captcha",
        "megatron.core": "megatron-core",
        "matplotlib": "matplotlib",
        "tqdm": "tqdm",
        "rich": "rich",
    },
    INSTALL_HINT,
)
