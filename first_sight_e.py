"""Breaks written from the code alone: (name, file, old, new, why). First sight, before any test was read."""
M = "megatron/core/models/mimo/"
C = "mimo_colocated/"
BREAKS = [
# ---- comm
("e-first-gradient-of-rank-zero", M+"comm/collectives.py", "dist.broadcast(first, dist.get_process_group_ranks(ctx.group)[0], group=ctx.group)", "dist.broadcast(first, 0, group=ctx.group)", "Groups of stages without global rank 0 cannot hand the gradient on."),
("e-rows-stay-in-any-order", M+"comm/exchange.py", "in_order = np.array_equal(plan.local_index, np.arange(plan.held))", "in_order = plan.local_index.size == plan.held", "Rows that only change places on their rank stay where they were."),
("e-gather-cp-sum-first-stage-only", M+"comm/gather_bridge.py", "(on_first or self.later_stages)", "on_first", "With levels on later stages their CP parts of gradients are not summed."),
("e-balance-digest-without-plan", M+"comm/plan/balance.py", "np.stack([self.tokens, self.home, self.replica])", "np.stack([self.tokens, self.home, self.home])", "Ranks that assign items differently are not noticed; the exchange mismatches."),
("e-last-rows-held-by-nobody", M+"comm/plan/group_rows.py", "np.flatnonzero(np.append(self._start, self.total) > reach)", "np.flatnonzero(self._start > reach[:-1])", "Rows at the end that no encoder replica holds are not refused."),
# ---- partition
("e-max-seqlen-of-real-lengths", M+"partition/packed_lengths.py", "    padded, _ = packed_lengths(params)\n", "    _, padded = packed_lengths(params)\n", "A max_seqlen below the padded length is accepted: rotary tables are too short."),
# ---- transformer
("e-blind-queries-stay-masked", M+"transformer/context_parallel_attention.py", "bias=allowed | blind)", "bias=allowed)", "A query that sees nothing makes NaN gradients."),
("e-item-parts-for-other-cp", M+"transformer/ulysses_attention.py", "if parts is None or parts.size != group.size():", "if parts is None:", "Parts for another CP size are taken instead of refused."),
("e-exact-loss-fp64-in-fp32", M+"transformer/exact_loss.py", "wide = logits.to(torch.promote_types(logits.dtype, torch.float32))", "wide = logits.float()", "Losses of fp64 models are of fp32."),
# ---- model
("e-token-positions-of-changed-ids", M+"model/token_positions.py", "and latest[1:3] == (version, ids):", "and latest[2] == ids:", "Ids that were changed in place keep the old places of rows."),
("e-frozen-text-needs-no-empty-rows", M+"model/encoder_runner.py", "return text_is_frozen or waits_for_gradients(submodule)", "return waits_for_gradients(submodule)", "With frozen text a rank without items has no backward pass: the others wait."),
("e-padding-too-short-for-tp", M+"model/no_samples.py", "shortest = 2 * config.context_parallel_size * config.tensor_model_parallel_size", "shortest = 2 * config.context_parallel_size", "A batch without length cannot be cut over TP."),
("e-text-drops-in-evaluation", M+"model/language_runner.py", "return nn.functional.dropout(embedded, share, module.training)", "return nn.functional.dropout(embedded, share)", "Under SP the embedded text is dropped in evaluation."),
("e-no-sync-only-of-first", M+"model/ddp_methods.py", "            for module in self._overlapping(\"overlap_grad_reduce\"):\n                stack.enter_context(module.no_sync())", "            for module in self._overlapping(\"overlap_grad_reduce\")[:1]:\n                stack.enter_context(module.no_sync())", "Only the first module's gradients accumulate."),
# ---- config
("e-level-after-the-last-layer", M+"config/checks.py", "not 0 <= numbers[0] <= numbers[-1] < count:", "not 0 <= numbers[0] <= numbers[-1] <= count:", "A level after a layer that does not exist is accepted and lost."),
# ---- submodules
("e-sequence-first-item-batch-dim", M+"submodules/encoder_outputs.py", "tensor.size(1 if self.sequence_first else 0) == 1:", "tensor.size(0) == 1:", "Sequence-first items (s, 1, h) are refused."),
("e-whole-items-encoder-by-encoder", M+"submodules/base.py", "[int(count) for item in zip(*counts, strict=True) for count in item]", "[int(count) for each in counts for count in each]", "Rows of two encoders' items are planned in another order than they come."),
# ---- pipeline
("e-whole-token-counts-dropped", M+"pipeline/step.py", "counted = [sum(fractions, tokens.double()) for tokens in counted if tokens is not None]", "counted = [sum(fractions) for tokens in counted if tokens is not None]", "Where some microbatches count in integers those are lost: gradients too large."),
# ---- gradients
("e-infinite-tokens-scale-to-zero", M+"gradients/finalize.py", "usable = (total > 0) & total.isfinite()", "usable = total > 0", "An infinite token count makes zero gradients in silence."),
("e-nonfinite-names-the-last", M+"gradients/nonfinite.py", "named = tuple(reversed(found[-_NAMED:]))", "named = tuple(found[:_NAMED])", "The message names a parameter far from the cause."),
# ---- memory
("e-plan-keeps-one-ahead-less", M+"memory/plan.py", "min(self.microbatches, ahead + 2)", "min(self.microbatches, ahead + 1)", "Planned memory is a microbatch too small."),
("e-plan-rows-of-a-frozen-encoder", M+"memory/plan.py", "elif memory.encoder == OFFLOAD:\n        host += min(parts.rows, parts.projector)", "elif encoder == OFFLOAD:\n        host += min(parts.rows, parts.projector)", "Rows of a frozen encoder are planned on the device."),
# ---- checkpoint
("e-load-beside-a-save", M+"checkpoint/store.py", "        self.wait()\n        with phases.during(phases.LOAD):", "        with phases.during(phases.LOAD):", "A load does not wait for the save in the background."),
("e-abandon-only-both", M+"checkpoint/history.py", "if s > self.stands_at or s >= step]", "if s > self.stands_at and s >= step]", "Checkpoints of an earlier line stay among those of this one."),
("e-empty-read-only-folder-refused", M+"checkpoint/shared_folder.py", "return bool(own & steps) or not own | steps", "return bool(own & steps)", "A read-only folder without checkpoints is said not to be shared."),
("e-distributed-main-copies-are-moments", M+"checkpoint/frozen_state.py", "_MAIN_COPIES = (\"param\", \"fp32_param\")", "_MAIN_COPIES = (\"fp32_param\",)", "Unfrozen weights restart from zero under the distributed optimizer."),
# ---- training
("e-reason-is-the-first-line", M+"training/agreement.py", "lines[-1] if lines else rest", "lines[0] if lines else rest", "A failure is told by the first line of its text, not where the reason stands."),
("e-new-group-starts-at-step-zero", M+"training/optimizer_settings.py", "found.append({**own, **steps})", "found.append(own)", "A new parameter group's Adam steps begin at none after loading."),
("e-frozen-group-accepted", M+"training/parameter_groups.py", "for each in named if each.parameter.requires_grad}", "for each in named}", "A group of frozen parameters is accepted and does nothing."),
("e-experts-compared-as-copies", M+"training/pretrained.py", "if id(parameter) in kept and getattr(parameter, \"allreduce\", True):", "if id(parameter) in kept:", "Experts of different ranks are refused as differing copies."),
# ---- huggingface
("e-export-config-of-source", M+"huggingface/export.py", "if not own.exists() or config != source.config:", "if not own.exists():", "An exported config.json says the old dtype and fields."),
("e-adapter-alpha-is-scale", M+"huggingface/lora_export.py", "\"lora_alpha\": lora.alpha,", "\"lora_alpha\": lora.scale,", "peft scales the adapters otherwise than they were trained."),
("e-run-past-the-tensor", M+"huggingface/weights.py", "if run.start + run.size > lengths[run.source]:", "if run.start > lengths[run.source]:", "A tensor that is too short is not refused before loading."),
("e-nan-logits-pass", M+"huggingface/logits_check.py", "            difference = torch.nan_to_num(difference, nan=math.inf)\n", "            difference = torch.nan_to_num(difference)\n", "mimo check passes a model whose logits are NaN."),
("e-sparse-step-counts-from-zero", M+"huggingface/families/decoders.py", "(n + 1) % step == 0", "n % step == 0", "Expert layers are in the wrong places."),
("e-own-mrope-section-ignored", M+"huggingface/families/qwen_vl.py", "{\"mrope_section\": rope[\"mrope_section\"], **given, **rope[\"always\"]}", "{**given, \"mrope_section\": rope[\"mrope_section\"], **rope[\"always\"]}", "The section that config.json names is overridden by the usual one."),
("e-own-tower-width-of-one-layer", M+"huggingface/own_encoders.py", "config.hidden_size * max(len(rows.depths), 1)", "config.hidden_size", "Rows of several layers do not fit the projector."),
# ---- job
("e-options-of-older-runs-missing", M+"job/loop.py", "before = type(self.options)().as_dict() | manifest.extra.get(\"options\", {})", "before = manifest.extra.get(\"options\", {})", "A run saved before an option came cannot be resumed."),
("e-scaling-counts-as-stuck", M+"job/loop.py", "if result.success or result.scaling:", "if result.success:", "A loss scale that is searched ends the run."),
("e-top-p-of-first-scores", M+"job/next_tokens.py", "(too_few | (found < missing)).any():", "too_few.any():", "top-p over TP keeps tokens that are below better ones of other shards."),
("e-host-memory-not-shared", M+"job/calibration.py", "return psutil.virtual_memory().total / ranks", "return float(psutil.virtual_memory().total)", "Each rank is planned to have all the host's memory."),
# ---- data
("e-shares-balanced-to-a-tenth", M+"data/batches.py", "EncoderBalance(threshold=1.0, cost=cost)", "EncoderBalance(cost=cost)", "Uneven work below a tenth is not balanced."),
("e-last-dot-is-the-extension", M+"data/tar_shards.py", "extension = name.rpartition(\"/\")[2].partition(\".\")[2]", "extension = name.rpartition(\".\")[2]", "KEY.seg.png is taken for KEY.png."),
("e-sound-length-rounded-down", M+"data/sounds.py", "return -(-frames * rate // own)", "return frames * rate // own", "A resampled sound has one number more than was planned."),
("e-same-order-each-epoch", M+"data/order.py", "np.random.default_rng([order.seed, epoch, 0])", "np.random.default_rng([order.seed, 0, 0])", "Every epoch mixes sources alike."),
("e-more-images-than-shown", M+"data/tables.py", "        if next(images, None) is not None:\n            raise SampleError(\"malformed\", f\"row {number} has more images than its messages show\")\n", "", "Images of a row that no message shows are dropped in silence."),
# ---- plan
("e-frozen-language-has-no-backward", M+"plan/step_time.py", "if not own.any and not any(work.encoder_trains(name) for name in shapes.encoders):", "if not own.any:", "A frozen language model that gradients pass is planned without its backward."),
("e-attention-flops-of-passed-gradients", M+"plan/flops.py", "BACKWARD_MATMUL * (trained or through)", "BACKWARD_MATMUL * trained", "A step's FLOPs miss attention's backward of a frozen model."),
("e-a-whole-node-is-between", M+"plan/machine.py", "        if span <= self.node:\n            return self.inside", "        if span < self.node:\n            return self.inside", "A group that fills a node is planned over the network."),
# ---- torch_native
("e-native-loss-without-labels", M+"torch_native/loss.py", "/ _at_least_one(divisor)", "/ divisor", "A batch without labels has a NaN loss."),
("e-native-buffers-not-compared", M+"torch_native/agreed.py", "named = [*model.named_parameters(), *model.named_buffers()]", "named = [*model.named_parameters()]", "Models whose buffers differ are sharded as one."),
# ---- towers
("e-grid-without-frames", M+"towers/image_grids.py", "if min(grid) < 1 or grid[1] % merge", "if min(grid) < 0 or grid[1] % merge", "An image of no frames is accepted."),
("e-whisper-drops-in-evaluation", M+"towers/whisper.py", "nn.functional.dropout(hidden + self.position_embedding, dropout, self.training)", "nn.functional.dropout(hidden + self.position_embedding, dropout)", "Whisper's dropout is on in evaluation."),
("e-small-tables-shrink", M+"towers/vision.py", "distance / max(scale, 1.0)", "distance / scale", "Positions of large SigLIP2 images are not interpolated."),
# ---- lossy
("e-resumed-link-counts-again", M+"lossy/link.py", "Counts(**saved[\"counts\"]), saved[\"counted\"]", "Counts(**saved[\"counts\"]), 0", "After resuming, messages that are sent again are counted."),
("e-phase-of-time-forgotten", M+"lossy/loss_models.py", "return states, float(times[-1] - np.floor(times[-1]))", "return states, 0.0", "Of short messages the chain in time never moves."),
("e-stale-is-not-a-copy", M+"lossy/link.py", "last=arrived.detach().clone() if", "last=arrived.detach() if", "What arrived last is overwritten by a sum in place."),
# ---- cli
("e-doctor-fails-on-notes", C+"cli/doctor.py", "int(any(line.state == BAD for line in lines))", "int(any(line.state != OK for line in lines))", "mimo doctor fails where only an extra is missing."),
("e-zero-replica-samples", C+"cli/planning.py", "int(part) > 0 for part in parts", "int(part) >= 0 for part in parts", "--replica-samples 0 is accepted."),
("e-last-refusal-is-told", C+"cli/planned_recipe.py", "refusal = refusal or error", "refusal = error", "What is told is why the last row does not fit, not the best one."),
# ---- launch
("e-peers-gave-up-despite-a-job-error", C+"launch/lost_ranks.py", "if any(report.kind in (\"job\", \"error\") for report in reports.values()):", "if any(report.kind == \"error\" for report in reports.values()):", "A refusal of one rank counts as a lost rank: ranks are killed."),
("e-steps-of-a-job-meet", C+"launch/slurm.py", "(int(environment[\"SLURM_JOB_ID\"]) * 31 + step)", "(int(environment[\"SLURM_JOB_ID\"]) * 31)", "Two steps of one job use one port."),
("e-environment-keeps-what-was-set", C+"launch/launcher.py", "        os.environ.clear()\n        os.environ.update(before)", "        os.environ.update(before)", "CUDA_VISIBLE_DEVICES stays empty after a job."),
# ---- train
("e-token-samples-without-last-label", C+"train/checks.py", "        longest += 1\n", "", "A capacity one token short is accepted and fails in mid-run."),
("e-peak-memory-in-kilobytes", C+"train/numbers.py", "ru_maxrss * 1024", "ru_maxrss", "Peak memory on CPUs is a thousandth."),
("e-tail-of-held-out-counted-twice", C+"train/evaluation.py", "batches.at(start).only(count - start)", "batches.at(start)", "The last sample counts as often as the batch lacks samples."),
("e-generate-stops-at-one-end", C+"train/answers.py", "\"eos_token_id\": [*ends, end]", "\"eos_token_id\": [end]", "The exported model no longer stops at its own ends."),
("e-report-counts-shown-answers", C+"train/report.py", "right = sum(each.right for each in read)", "right = sum(each.right for each in read[:ANSWERS])", "The page says that far fewer answers are right."),
("e-profile-rank-past-the-world", C+"train/profile_steps.py", "self.ranks[-1] >= world:", "self.ranks[-1] > world:", "A rank that does not exist is accepted: nothing is recorded."),
# ---- forensics
("e-retired-calls-are-under-way", C+"forensics/who_waits.py", "under_way=not entry.get(\"retired\") and entry.get(\"state\") != \"completed\"", "under_way=entry.get(\"state\") != \"completed\"", "A call that has ended is taken for the one that is waited in."),
("e-group-status-of-one-recorder", C+"forensics/flight_recorder.py", "for key in (\"pg_config\", \"pg_status\"):", "for key in (\"pg_config\",):", "Gloo groups' status is lost where NCCL's recorder answers too."),
# ---- top
("e-own-ranks-as-listed", C+"process_groups.py", "next((sorted(ranks) for ranks in rank_enum if rank in ranks), None)", "next((ranks for ranks in rank_enum if rank in ranks), None)", "Members that list a group in another order number it differently."),
("e-nonfinite-norm-of-a-copy", M+"optimizer.py", "(self._speaks_for(name) or not math.isfinite(norm)):", "self._speaks_for(name):", "A norm that is not finite on one copy alone is not seen: replicas part."),
]
if __name__ == "__main__":
    import pathlib, sys
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    names = set()
    for name, file, old, new, why in BREAKS:
        text = (root / file).read_text(); n = text.count(old)
        assert name not in names, name
        names.add(name)
        if n != 1: print(name, file, n); continue
        compile(text.replace(old, new), file, "exec")
    print(len(BREAKS))
