# SPDX-License-Identifier: Apache-2.0
"""What Megatron-Core's local layers lack without Transformer Engine.

:mod:`.context_parallel_attention` is a core attention for language CP >= 1, :mod:`.norms` has
norm layers that work under sequence parallelism, and :mod:`.layer_specs` puts both into layer
specs that ``GPTModel`` and ``TransformerBlock`` take.
"""
