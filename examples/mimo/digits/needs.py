# SPDX-License-Identifier: Apache-2.0
"""What the job cannot do without."""

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
