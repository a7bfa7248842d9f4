# SPDX-License-Identifier: Apache-2.0
"""Who waits for whom, from flight-recorder dumps and phases: down to the rank that all wait for.

Pure: dumps are the dictionaries that PyTorch's flight recorder makes (``entries``, ``pg_config``),
places those of ``phases``. A rank that was killed or is stopped has no dump; what it lacks is seen
in those of the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mimo_colocated.phases import Place

# Groups that differ are listed up to this many, so that a summary of many ranks stays readable.
_GROUPS_SHOWN = 24
_RANKS_SHOWN = 64
ALL_RANKS = "all ranks"
"""What the default process group is called."""


@dataclass(frozen=True)
class Call:
    """One collective that a rank has entered.

    Attributes:
        kind: such as ``"all_gather"``.
        group: name of the process group.
        ranks: global ranks that take part.
        seq: number of the collective in its group, from 1; 0 for what the recorder does not count.
        shapes: of its inputs, in words.
        at: when it was entered, in nanoseconds.
        under_way: it had not ended.
        on_device: it waits on the device, while the host that entered it goes on.
    """

    kind: str
    group: str
    ranks: tuple[int, ...]
    seq: int
    shapes: str = ""
    at: int = 0
    under_way: bool = False
    on_device: bool = False

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """The group, recognised on all of its ranks."""
        return self.group, self.ranks

    def words(self) -> str:
        """Return the call in words.

        >>> Call("all_gather", "cp", (0, 2), 17).words()
        'all_gather #17 of the group cp [0, 2]'
        """
        number = f" #{self.seq}" if self.seq else ""
        return f"{self.kind}{number} of {group_in_words(self.group, self.ranks)}"


def calls_of(dump: Mapping[str, Any]) -> list[Call]:
    """Return the calls of a dump, the earliest first, without those of unknown groups.

    A batch of sends and receives is one call.
    """
    groups = dump.get("pg_config", {})
    found = []
    for entry in dump.get("entries", ()):
        name, description = (*entry["process_group"], "")[:2]
        ranks = _members(groups.get(str(name), {}))
        if not ranks:
            continue
        p2p = bool(entry.get("is_p2p"))
        found.append(
            Call(
                kind=_kind(entry.get("profiling_name", "")),
                group=_group_name(str(name), description or groups[str(name)].get("desc", "")),
                ranks=ranks,
                seq=int(entry.get("p2p_seq_id" if p2p else "collective_seq_id") or 0),
                shapes=_shapes(entry),
                at=int(entry.get("time_created_ns") or 0),
                under_way=not entry.get("retired") and entry.get("state") != "completed",
                on_device=str(entry.get("profiling_name", "")).startswith("nccl"),
            )
        )
    return sorted(found, key=lambda call: call.at)


@dataclass(frozen=True)
class WhoWaits:
    """The answer, for one failure.

    Attributes:
        culprits: rank -> what became of it (``"was killed by SIGKILL"``). Empty: nobody knows, and
            ranks that others wait for while they themselves wait for nobody are taken.
        places: rank -> where it was, as far as recorded.
        dumps: rank -> its flight recorder's dump, as far as saved.
        gave_up: ranks that ended by an error about a lost rank; the last call of their dump is
            what they waited in, even if the recorder calls it done.
    """

    culprits: Mapping[int, str] = field(default_factory=dict)
    places: Mapping[int, Place] = field(default_factory=dict)
    dumps: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    gave_up: frozenset[int] = frozenset()

    # ---- what each rank waits in ----------------------------------------------------------

    @cached_property
    def calls(self) -> dict[int, list[Call]]:
        """Rank -> the calls of its dump."""
        return {rank: calls_of(dump) for rank, dump in sorted(self.dumps.items())}

    @cached_property
    def waits(self) -> dict[int, Call]:
        """Rank -> what it waits in; ranks that wait for nobody, or left no dump, are missing."""
        ranks = sorted({*self.dumps, *self.places} - set(self.culprits))
        found = {rank: self._wait_of(rank) for rank in ranks}
        return {rank: call for rank, call in found.items() if call is not None}

    def _wait_of(self, rank: int) -> Call | None:
        calls = self.calls.get(rank, [])
        candidates = [call for call in calls if call.under_way]
        noted = self.places[rank].wait if rank in self.places else None
        if noted is not None:
            ranks = tuple(sorted({rank, *noted.peers}))
            candidates.append(Call(noted.kind, _group_name("", noted.group), ranks, 0))
        if not candidates and rank in self.gave_up:
            candidates = calls[-1:]
        # Of several that are under way (a reduction that overlaps), the one that cannot end.
        stuck = [call for call in candidates if self._missing(call, rank)]
        return next(iter([*stuck, *candidates]), None)

    def _missing(self, call: Call, rank: int) -> list[int]:
        """Members of a call that others of it wait for: lost, or not there yet."""
        return [
            member
            for member in call.ranks
            if member != rank and (member in self.culprits or not self._entered(member, call))
        ]

    def _entered(self, rank: int, call: Call) -> bool:
        """Whether a rank has entered the same call; unknown counts as entered."""
        if rank not in self.calls or not call.seq:
            return True
        same = [each.seq for each in self.calls[rank] if each.key == call.key]
        return max(same, default=0) >= call.seq

    # ---- the culprit ----------------------------------------------------------------------

    @cached_property
    def lost(self) -> list[int]:
        """The ranks that all wait for in the end."""
        if self.culprits:
            return sorted(self.culprits)
        wanted = {m for rank, call in self.waits.items() for m in self._missing(call, rank)}
        return sorted(wanted - set(self.waits))

    @cached_property
    def direct(self) -> dict[int, Call]:
        """Ranks that wait for a lost rank itself, and in what."""
        lost = set(self.lost)
        return {rank: call for rank, call in self.waits.items() if lost & set(call.ranks)}

    def place_of(self, rank: int) -> str:
        """Return where a rank was, in words; where the device was, if its host had gone on."""
        host, device = self.places[rank].words(), self._device_place(rank)
        if device is None or device.words() == host:
            return host
        return f"{device.words()} on the device, while its host was in {host}"

    def _device_place(self, rank: int) -> Place | None:
        """The phase in which the host entered what the device had not ended; ``None``: nothing."""
        place = self.places[rank]
        if rank in self.calls:
            found = [c for c in self.calls[rank] if c.under_way and c.on_device]
            waits = self.waits.get(rank, next(iter(found), None))
            return place.as_of(waits.at / 1e9) if waits is not None and waits.on_device else None
        # Lost without a word: others tell what it did not end. If its host has been past that
        # phase, the device was still there.
        if rank in self.lost and self.direct:
            other, call = min(self.direct.items(), key=self._remoteness)
            theirs = self.places[other].as_of(call.at / 1e9) if other in self.places else None
            return place.passed(theirs) if theirs is not None and call.on_device else None
        return None

    def where(self, ranks: Sequence[int]) -> str:
        """Say `` in the phase ...`` of ranks that were in one; empty if nothing is known."""
        words = {self.place_of(rank) for rank in ranks if rank in self.places}
        if len(words) == 1:
            return f" in {words.pop()}"
        return (
            " in "
            + " and ".join(
                f"{self.place_of(rank)} (rank {rank})"
                for rank in ranks
                if rank in self.places
            )
            if words
            else ""
        )

    def waited(self) -> str:
        """Return who waits for the lost ranks, in what; one clause, empty if nothing is known.

        Of several collectives the one is named that nobody else holds up, and in which somebody
        waited first.
        """
        if not self.direct:
            return "no rank was waiting for it yet" if self.places else ""
        first = min(self.direct.items(), key=self._remoteness)[1]
        ranks = [rank for rank, call in self.direct.items() if _same(call, first)]
        whom = "it" if len(self.lost) == 1 else "them"
        return f"{ranks_in_words(ranks)} waited for {whom} in {first.words()}"

    def _remoteness(self, wait: tuple[int, Call]) -> tuple[bool, bool, int]:
        rank, call = wait
        others = set(self._missing(call, rank)) - set(self.lost)
        return bool(others), not call.seq, call.at

    # ---- the whole story ------------------------------------------------------------------

    def text(self) -> str:
        """Return the summary: lost ranks, who waits for them, who for those, groups, every rank."""
        return "\n".join([*self._heading(), "", *self._chain(), *self._groups(), *self._ranks()])

    def _heading(self) -> list[str]:
        lines = []
        for rank in self.lost:
            what = self.culprits.get(rank, "is waited for and waits for nobody")
            lines.append(f"Rank {rank} {what}{self.where([rank])}.")
        return lines or ["No rank was found that the others wait for."]

    def _chain(self) -> list[str]:
        if not self.waits:
            return ["No rank waited for another one, as far as dumps were saved.", ""]
        others = {rank: call for rank, call in self.waits.items() if rank not in self.direct}
        lines = ["Waiting for it:" if len(self.lost) == 1 else "Waiting for them:"]
        lines += [f"  {line}" for line in self._grouped(self.direct)] or ["  nobody"]
        if others:
            lines += ["Waiting for ranks that wait themselves:"]
            lines += [f"  {line}" for line in self._grouped(others)]
        return [*lines, ""]

    def _grouped(self, waits: Mapping[int, Call]) -> list[str]:
        """One line per call, with all ranks that wait in it."""
        lines, done = [], set()
        for rank, call in waits.items():
            if rank in done:
                continue
            ranks = [other for other, its in waits.items() if _same(its, call)]
            done |= set(ranks)
            shapes = f", {call.shapes}" if call.shapes else ""
            missing = [m for m in self._missing(call, rank) if m not in self.lost]
            for_whom = f", for {ranks_in_words(missing)}" if missing else ""
            lines.append(f"{ranks_in_words(ranks)} in {call.words()}{for_whom}{shapes}")
        return lines

    def _groups(self) -> list[str]:
        """Groups whose ranks have not all entered the same number of collectives."""
        last: dict[tuple[str, tuple[int, ...]], dict[int, Call]] = {}
        for rank, calls in self.calls.items():
            for call in calls:
                if call.seq and _is_collective(call):
                    last.setdefault(call.key, {})[rank] = call
        uneven = {
            key: entered
            for key, entered in last.items()
            if len({call.seq for call in entered.values()}) > 1 or set(self.lost) & set(key[1])
        }
        if not uneven:
            return []
        lines = [
            "Last collective that each rank has entered, of groups with a lost rank or uneven:"
        ]
        for (name, ranks), entered in sorted(uneven.items())[:_GROUPS_SHOWN]:
            told = [
                f"{rank}: {entered[rank].kind} #{entered[rank].seq}" if rank in entered
                else f"{rank}: {'none' if rank in self.calls else 'unknown'}"
                for rank in ranks
            ]  # fmt: skip
            lines.append(f"  {group_in_words(name, ranks)}: {', '.join(told)}")
        if len(uneven) > _GROUPS_SHOWN:
            lines.append(f"  and {len(uneven) - _GROUPS_SHOWN} more")
        return [*lines, ""]

    def _ranks(self) -> list[str]:
        ranks = sorted({*self.places, *self.dumps, *self.culprits})
        lines = ["Every rank:"] if ranks else []
        for rank in ranks[:_RANKS_SHOWN]:
            place = self.place_of(rank) if rank in self.places else "no phase recorded"
            if rank in self.waits:
                doing = f"waiting in {self.waits[rank].words()}"
            elif rank in self.culprits:
                doing = self.culprits[rank]
            else:
                doing = "in no collective" if rank in self.dumps else "no dump saved"
            lines.append(f"  rank {rank}: {place}; {doing}")
        if len(ranks) > _RANKS_SHOWN:
            lines.append(f"  and {len(ranks) - _RANKS_SHOWN} more")
        return lines


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Return ranks in words; runs of three and more are joined.

    >>> ranks_in_words([0, 1, 2, 5])
    'ranks 0-2 and 5'
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    parts = _runs(ranks)
    return f"ranks {', '.join(parts[:-1])} and {parts[-1]}" if parts[1:] else f"ranks {parts[0]}"


def group_in_words(name: str, ranks: Sequence[int]) -> str:
    """Return a process group in words.

    >>> group_in_words("dp-cp", [0, 2, 3, 4])
    'the group dp-cp [0, 2-4]'
    """
    return name if name == ALL_RANKS else f"the group {name} [{', '.join(_runs(ranks))}]"


def _runs(ranks: Sequence[int]) -> list[str]:
    """Ranks as text, three and more in a row as one."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts: list[str] = []
    for run in runs:
        parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
    return parts


def _same(one: Call, other: Call) -> bool:
    return (one.kind, one.key, one.seq) == (other.kind, other.key, other.seq)


def _is_collective(call: Call) -> bool:
    return call.kind.partition(" ")[0] not in ("send", "recv", "receive")


def _members(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ranks of a group; PyTorch keeps them as text."""
    ranks = config.get("ranks", "[]")
    return tuple(json.loads(ranks) if isinstance(ranks, str) else ranks)


def _kind(profiling_name: str) -> str:
    """``"gloo:all_gather"`` -> ``"all_gather"``; NCCL's names are lower-cased C++ ones."""
    return profiling_name.rpartition(":")[2] or "a collective"


def _group_name(name: str, description: str) -> str:
    if description in ("", "undefined"):
        return name
    return ALL_RANKS if description == "default_pg" else description


def _shapes(entry: Mapping[str, Any]) -> str:
    sizes, dtypes = entry.get("input_sizes") or (), entry.get("input_dtypes") or ()
    told = [f"{dtype} {list(size)}" for dtype, size in zip(dtypes, sizes, strict=False)]
    return ", ".join(told[:4]) + (", ..." if len(told) > 4 else "")
