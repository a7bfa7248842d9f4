# SPDX-License-Identifier: Apache-2.0
"""What a rank of a command runs where ranks are processes of their own."""

import sys

if __name__ == "__main__":
    # This folder comes first on the path of a script; its names are not meant for others.
    sys.path.pop(0)
    from mimo_colocated.cli.main import main

    sys.exit(main(sys.argv[1:]))
