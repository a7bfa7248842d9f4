# SPDX-License-Identifier: Apache-2.0
"""A training loop that records some of its steps."""

from __future__ import annotations

from typing import Any

from megatron.core.models.mimo.huggingface.all_ranks import on_all_ranks
from megatron.core.models.mimo.job.loop import TrainingLoop
from megatron.core.models.mimo.job.reporter import Reporter
from megatron.core.models.mimo.job.trainer import Trainer
from mimo_colocated.launch.training_options import TrainingOptions
from mimo_colocated.stop_requests import StopRequests
from mimo_colocated.train.profile_steps import Profile
from mimo_colocated.train.tracing import FOLDER, Tracer


class TracedLoop(TrainingLoop):
    """Trains on one rank, all ranks together, and writes a trace of the steps that are asked for.

    Args:
        options, trainer, data, requests: as of :class:`.TrainingLoop`.
        profile: steps to record; None for none.
    """

    results = (*TrainingLoop.results, FOLDER)

    def __init__(
        self,
        options: TrainingOptions,
        trainer: Trainer,
        data: Any,
        requests: StopRequests,
        profile: Profile | None,
    ) -> None:
        super().__init__(options, trainer, data, requests)
        self._profile = profile
        self._tracer = None if profile is None else Tracer(profile, options.out, self.rank)

    def start(self) -> int:
        """Resume or start anew, unless steps to record are done already."""
        done = super().start()
        if self._profile is not None:
            self._profile.check_ahead(done)
        return done

    def train(self, sequence_length: int) -> Reporter | None:
        """Train; a run that ends early leaves the trace of what it recorded until then."""
        try:
            return super().train(sequence_length)
        finally:
            if self._tracer is not None:
                self._tracer.write()

    def _step(self, done: int, reporter: Reporter | None) -> int:
        tracer = self._tracer
        if tracer is None:
            return super()._step(done, reporter)
        with tracer.step(done + 1):
            done = super()._step(done, reporter)
        if tracer.ends_with(done):
            on_all_ranks(tracer.write, "write the trace")
            self.say(f"wrote {tracer.path.parent}, for https://ui.perfetto.dev or chrome://tracing")
            if reporter:
                reporter.progress.pause()
        return done
