# SPDX-License-Identifier: Apache-2.0
"""What a rank does before it waits for another stage: note for whom, and let encoders run."""

from __future__ import annotations

from typing import Any, Protocol

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from mimo_colocated import phases


class EncodingBetween(Protocol):
    """The encoders' share of a step, as an exchange between stages calls it."""

    def ask(self, number: int) -> None:
        """Let encoders take their turn before microbatch ``number``."""

    def encode_later(self, *, first_wait: bool) -> None:
        """Encode what is left for bubbles; see :func:`.before_the_first_input`."""

    def send_later(self) -> None:
        """Send off the rows of what was left for bubbles."""


class NotedP2P(P2PCommunicator):
    """Stock's exchange between stages; a rank that waits in it notes for whom.

    PyTorch's flight recorder has no sends and receives of gloo.
    """

    def _communicate(self, **tensors: Any) -> Any:
        def ranks(before: str, after: str) -> list[Any]:
            ends = ((before, self.prev_rank), (after, self.next_rank))
            return [
                rank
                for name, rank in ends
                if tensors[name] is not None and tensors[name] is not False
            ]

        sends = ranks("tensor_send_prev", "tensor_send_next")
        receives = ranks("recv_prev", "recv_next")
        kind = "receive" if receives else "send"
        with phases.waiting(kind, sorted({*sends, *receives}), self.pp_group.group_desc):
            return super()._communicate(**tensors)


class EncodingP2P(NotedP2P):
    """Stock's exchange between stages; encoders take their turns before a stage waits for input.

    What is left for bubbles is encoded before the two long waits of 1F1B: for the first input, and
    for the first gradient. Its rows are sent off before the latter; on the last stage, which waits
    for no gradient, after its first backward pass.
    """

    def __init__(self, pp_group: Any, config: Any, encoders: EncodingBetween) -> None:
        super().__init__(pp_group, config)
        self._encoders, self._asked = encoders, 0

    def _ask(self) -> None:
        self._encoders.ask(self._asked)
        self._asked += 1

    def recv_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Ask, then as stock."""
        if self._asked == 0:
            self._encoders.encode_later(first_wait=True)
        self._ask()
        return super().recv_forward(*args, **kwargs)

    def send_forward_recv_backward(
        self, output_tensors: Any, tensor_shapes: Any, is_last_stage: bool
    ) -> Any:
        """Encode what is left, then as stock."""
        self._encoders.encode_later(first_wait=False)
        if not is_last_stage:
            self._encoders.send_later()
        return super().send_forward_recv_backward(output_tensors, tensor_shapes, is_last_stage)

    def send_backward_recv_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Ask, then as stock."""
        self._encoders.send_later()
        self._ask()
        return super().send_backward_recv_forward(*args, **kwargs)
