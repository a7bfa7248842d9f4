"""The fourth quarter of the list, set aside for time at first and taken up again; also written before any test was read."""
M = "megatron/core/models/mimo/"
C = "mimo_colocated/"
BREAKS = [
("e-balance-other-arguments-differ", M+"comm/input_balance.py", "if (each.tensors, each.others) != (model.tensors, model.others):", "if each.tensors != model.tensors:", "A rank's own flags or sizes are silently replaced by another rank's."),
("e-read-lengths-alias-the-loader", M+"partition/packed_lengths.py", "host.to(torch.int32, copy=True)", "host.to(torch.int32)", "A loader that fills its lengths anew changes those of a backward pass."),
("e-adapter-tp-dim", M+"transformer/lora.py", "set_tensor_model_parallel_attributes(cut, True, 0 if self.column else 1, 1)", "set_tensor_model_parallel_attributes(cut, True, 0, 1)", "A row-parallel layer's A says that TP cuts its rank dim."),
("e-mixed-problems-heard-once", M+"model/mixed_path.py", "return self._routed.exchange_problems(found, count)", "return self._routed.exchange_problems(problems, count)", "What the gather bridges heard is forgotten: ranks go different ways."),
("e-cp-comm-list-not-looked-at", M+"config/checks.py", "if \"a2a+p2p\" in (kinds if isinstance(kinds, (list, tuple)) else [kinds]):", "if kinds == \"a2a+p2p\":", "Per-layer cp_comm_type with a2a+p2p is accepted."),
("e-last-window-never-last", M+"pipeline/step.py", "last = (window + 1) * self._window >= self._count", "last = (window + 1) * self._window > self._count", "Gradients that overlap are not reduced at the last window."),
("e-conjugates-offloaded-plain", M+"memory/offload.py", "return not (tensor.is_conj() or tensor.is_neg())", "return True", "A conjugated view comes back unconjugated: wrong gradients."),
("e-main-copies-refused-alone", M+"checkpoint/load_checks.py", "if any(gathered(copied)):", "gathered(copied)\n    if copied:", "Only the ranks with copies refuse; the others wait in the load."),
("e-same-shard-seed-accepted", M+"training/initial_weights.py", "        if other != name:\n", "        if not other:\n", "Two weights start from the same numbers without an error."),
("e-export-dtype-of-parts", M+"huggingface/export.py", "            value = _with_dtype(value, dtype)\n", "            value = dict(value)\n", "Nested configurations keep the old dtype."),
("e-cut-short-folder-read", M+"huggingface/folder.py", "if got != each:", "if not got:", "A file cut short while it is read yields numbers of nothing."),
("e-token-id-past-vocabulary", M+"huggingface/compose.py", "if not 0 <= token_id < text.vocab_size:", "if not 0 <= token_id <= text.vocab_size:", "A token past the vocabulary is taken for images."),
("e-half-a-line-stays", M+"job/results.py", "                os.ftruncate(self._file, self._size)\n                raise\n", "                raise\n", "A full disk leaves half a line in metrics.jsonl, and the next run refuses it."),
("e-readers-die-of-sigusr1", M+"data/readers.py", "for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):", "for sent in (signal.SIGINT, signal.SIGTERM):", "A stop request to the job kills the readers before the save."),
("e-prepared-for-any-length", M+"data/encoding.py", "f\"{_MADE} {self.max_tokens}\".encode()", "f\"{_MADE}\".encode()", "Data prepared for another max_tokens is taken."),
("e-virtual-stages-any-microbatches", M+"plan/candidates.py", "(language.pp == 1 or m % language.pp):", "language.pp == 1:", "Plans are shown that the schedule refuses."),
("e-native-clip-scales-up", M+"torch_native/gathered.py", "(max_norm / (norm + 1e-6)).clamp_max(1.0)", "max_norm / (norm + 1e-6)", "Small gradients are scaled up to the norm."),
("e-bursts-end-with-messages", M+"lossy/statistics.py", "np.concatenate([[in_burst], lost[:-1]])", "np.concatenate([[False], lost[:-1]])", "A burst over two messages counts twice."),
("e-seed-zero-without-draws", C+"cli/generating.py", "if options.more[name] is not None and options.more[\"temperature\"] is None:", "if options.more[name] and options.more[\"temperature\"] is None:", "--seed 0 without --temperature is accepted and ignored."),
("e-killed-later-is-the-reason", C+"launch/failures.py", "end.code != -signal.SIGTERM and end.at <= limit", "end.code != -signal.SIGTERM", "Ranks that the launcher killed are named as the reason."),
("e-lengths-of-held-out-ignored", C+"train/recipe.py", "        parts = [*self.data.train, *self.data.held_out]\n        return len(", "        parts = self.data.train\n        return len(", "Held-out tokens of another length go through stages that cannot tell."),
("e-prepared-for-other-answers", C+"train/data.py", "data.look_at_images, answer_tokens]", "data.look_at_images, bool(answer_tokens)]", "Questions prepared for another answer_tokens are taken."),
("e-tensorboard-keeps-undone-steps", C+"train/boards.py", "SummaryWriter(str(folder), purge_step=first)", "SummaryWriter(str(folder))", "Steps after the checkpoint that a run resumes from stay in the curves."),
("e-phase-of-an-error-forgotten", C+"phases.py", "    before = _own.phase\n    mark(phase)\n    yield\n    mark(before)\n", "    before = _own.phase\n    mark(phase)\n    try:\n        yield\n    finally:\n        mark(before)\n", "After an error nobody knows in which phase the rank was."),
]
