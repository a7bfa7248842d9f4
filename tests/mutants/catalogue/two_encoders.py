# SPDX-License-Identifier: Apache-2.0
"""Mistakes with a second encoder, in the example job that others copy from."""

from tests.mutants.catalogue.places import EXAMPLE, FUNCTIONAL, MIMO
from tests.mutants.mutant import Mutant

_STEPS = FUNCTIONAL + "test_digits_two_encoders.py::"
_SOUNDS = FUNCTIONAL + "test_digits_sounds.py::"

TWO_ENCODERS = (
    Mutant(
        name="sounds-planned-where-images-stand",
        file=EXAMPLE + "job.py",
        old="data.tokens(MODALITIES[name].token, *at)",
        new='data.tokens(MODALITIES["images"].token, *at)',
        tests=(_STEPS + "test_steps_without_sounds_or_images_leave_their_encoder_alone",),
        why="the audio encoder's rows are sent to the places of image tokens",
        ranks=2,
    ),
    Mutant(
        name="sounds-planned-once-for-all-batches",
        file=MIMO + "job/route_plans.py",
        old="if known and np.array_equal(known[0], tokens) and",
        new="if known and",
        tests=(_STEPS + "test_a_plan_serves_as_long_as_tokens_stand_in_the_same_places",),
        why="samples show other things in every batch, and rows go where the first had them",
    ),
    Mutant(
        name="sounds-cut-like-images",
        file=EXAMPLE + "data.py",
        old="rank, ranks = parts.get(module, (0, 1))",
        new='rank, ranks = parts.get("images" if module == "audio" else module, (0, 1))',
        tests=(_SOUNDS + "test_each_side_gets_its_own_samples",),
        why="audio replicas encode sounds of samples that others encode too",
    ),
    Mutant(
        name="frames-of-other-times-in-a-token",
        file=EXAMPLE + "model.py",
        old="unflatten(0, (-1, FRAMES_PER_TOKEN)).mean(dim=1)",
        new="unflatten(0, (FRAMES_PER_TOKEN, -1)).mean(dim=0)",
        tests=(_SOUNDS + "test_a_token_is_the_mean_of_four_frames",),
        why="each token is a mean over the whole sound; the shape is the same",
    ),
    Mutant(
        name="held-out-sounds-follow-the-seed",
        file=EXAMPLE + "data.py",
        old='return (SPLIT_SEED, step, 2) if self.split == "held_out"',
        new='return (self.seed, step, 2) if self.split == "held_out"',
        tests=(_SOUNDS + "test_held_out_sounds_do_not_follow_the_seed",),
        why="accuracies of runs with other seeds are of other sounds",
    ),
    Mutant(
        name="one-modality-freezes-as-the-other",
        file=MIMO + "job/built_model.py",
        old='for prefix in ("", f"{sides[name]}-"):',
        new='for prefix in ("", "vision-"):',
        tests=(_STEPS + "test_parts_of_either_modality_freeze",),
        why="--freeze vision-encoder stops the audio encoder, too",
        ranks=2,
    ),
)
