# SPDX-License-Identifier: Apache-2.0
"""A layer that is computed again in backward loses the same packets again.

What recomputes (Megatron's checkpoints, ``memory.recomputed``) notes the random states before a
part and puts them back before it runs again. While links are installed their states are noted and
put back with those; the functions that do it are Megatron's and ours again afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from megatron.core.models.mimo.lossy.link import Link, LinkState
from megatron.core.models.mimo.memory import recomputed
from megatron.core.tensor_parallel import random

# (module, what notes, what puts back); both move a tuple of states.
_PAIRS: list[tuple[Any, str, str]] = [
    (random, "_get_all_rng_states", "_set_all_rng_states"),
    (recomputed, "_states", "_restore"),
]
_followed: list[list[Link]] = []
_found: list[tuple[Any, str, Any]] = []


class LinkStates(dict[Link, LinkState]):
    """States of links, which ride along at the end of a tuple of random states."""


def follow(links: Iterable[Link]) -> Callable[[], None]:
    """Keep links in step with recomputed layers; returns what ends it."""
    mine = list(links)
    if not _followed:
        _put_in_place()
    _followed.append(mine)

    def end() -> None:
        _followed[:] = [each for each in _followed if each is not mine]
        if not _followed:
            while _found:
                setattr(*_found.pop())

    return end


def _put_in_place() -> None:
    for module, note, put_back in _PAIRS:
        noting, putting = getattr(module, note), getattr(module, put_back)
        _found.extend([(module, note, noting), (module, put_back, putting)])
        setattr(module, note, _noting(noting))
        setattr(module, put_back, _putting_back(putting))


def _noting(stock: Callable[[], tuple[Any, ...]]) -> Callable[[], tuple[Any, ...]]:
    def note() -> tuple[Any, ...]:
        states = LinkStates((link, link.state) for links in _followed for link in links)
        return (*stock(), states)

    return note


def _putting_back(stock: Callable[..., None]) -> Callable[..., None]:
    def put_back(*given: Any) -> None:
        # Megatron's is given the states one by one, ours as one tuple.
        together = len(given) == 1
        states = given[0] if together else given
        # What was noted before the links were installed has none.
        links = states[-1] if isinstance(states[-1], LinkStates) else LinkStates()
        own = states[:-1] if isinstance(states[-1], LinkStates) else states
        stock(own) if together else stock(*own)
        for link, state in links.items():
            link.state = state

    return put_back
