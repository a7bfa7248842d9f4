# SPDX-License-Identifier: Apache-2.0
"""The models that parity, reshape, benchmarks, mutants and unit tests stand on.

    model.py     a small vision-language model in all variants, some of which only proofs need: tied
                 embeddings, an encoder without a layout of its own, ranks that begin at an offset,
                 every kind of expert
    encoders.py  its encoders
    trainer.py   their steps
    memory.py    what the memory plan knows of them

Their data are the digits: ``examples.mimo.digits.data``.
"""
