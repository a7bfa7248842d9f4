# SPDX-License-Identifier: Apache-2.0
"""The digits job's options: what is refused, with which numbers, and what is suggested instead."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path
from typing import Any

import pytest

from examples.mimo.digits.options import HEADS, SEQUENCE_LENGTH, Options, parse_options
from megatron.core.models.mimo.partition.sequence_order import shard_factor
from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.layouts import (
    MAX_RANKS,
    Layout,
    Layouts,
    Limits,
    check_layouts,
    every_pair,
    misfits,
    suggest,
    suggestion,
)

pytestmark = pytest.mark.once


def pair(vision: Layout, language: Layout, audio: Layout | None = None) -> Layouts:
    return Layouts({"vision": vision} | ({"audio": audio} if audio else {}), language)


def limits_of(batch: int, *more: Any, **named: Any) -> Limits:
    heads = dict.fromkeys(("vision", "audio", "language"), HEADS)
    return Limits(batch, *more, **{"sequence_length": SEQUENCE_LENGTH, "heads": heads, **named})


def test_the_defaults_are_the_job_of_make_train() -> None:
    options = parse_options([])
    assert str(options.layouts) == "--vision tp=2,dp=4 --language tp=2,cp=2,dp=2"
    assert (options.world_size, options.dtype, options.backend) == (8, "float32", "auto")
    assert options.out == Path("runs/digits")
    assert not options.fresh
    assert options == Options()
    assert options.audio is None


def _parse(arguments: str, world_size: int | None = None) -> Options:
    return parse_options(arguments.split(), world_size)


def test_the_largest_job_is_checked_and_none_beyond() -> None:
    for ranks, wrong in ((MAX_RANKS, []), (MAX_RANKS + 8, ["more than 16384"])):
        found = misfits(pair(Layout(tp=8, dp=ranks // 8), Layout(dp=ranks)), limits_of(ranks))
        assert [text[-len(end) :] for text, end in zip(found, wrong, strict=True)] == wrong


def test_every_option_is_read() -> None:
    options = _parse(
        "--vision dp=2,tp=1 --language cp=2 --steps 7 --seed 0 --global-batch-size 8 --lr 1e-3 "
        "--micro-batches 2 --eval-batch-size 4 --clip-grad 0 --sequence-parallel --fresh "
        "--no-distributed-optimizer --no-overlap-grad-reduce --dtype bfloat16 --backend gloo "
        "--timeout 9 --out a/b --save-every 3 --no-evaluate --uneven-loss-mask "
        "--freeze encoder+projector --dropout 0.1 --recompute full "
        "--encoder-memory recompute --projector-memory offload --memory-plan "
        "--max-skipped 4"
    )
    assert options.vision == Layout(1, 1, 2)
    assert options.language == Layout(1, 2, 1)
    assert (options.steps, options.seed, options.global_batch_size) == (7, 0, 8)
    assert (options.micro_batches, options.eval_batch_size, options.save_every) == (2, 4, 3)
    assert (options.lr, options.clip_grad, options.timeout) == (1e-3, 0.0, 9)
    assert (options.dtype, options.backend, options.out) == ("bfloat16", "gloo", Path("a/b"))
    assert (options.freeze, options.dropout) == ("encoder+projector", 0.1)
    assert options.recompute == "full"
    assert (options.encoder_memory, options.projector_memory) == ("recompute", "offload")
    assert options.memory_plan
    assert options.max_skipped == 4
    assert options.sequence_parallel
    assert options.fresh
    assert options.uneven_loss_mask
    assert not (options.distributed_optimizer)
    assert not (options.overlap_grad_reduce)
    assert not (options.evaluate)
    assert options.as_dict()["language"] == "tp=1,cp=2,dp=1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--language tp=2,cp=2,dp=4",
            "vision tp=2,dp=4 spans 8 ranks, language tp=2,cp=2,dp=4 spans 16, and both must span "
            "the same ranks; try --vision tp=2,dp=4 --language tp=2,cp=2,dp=2",
        ),
        (
            "--vision tp=4,dp=3 --language tp=6,dp=2 --global-batch-size 12 --eval-batch-size 12",
            "vision dp=3 and language dp=2 do not divide, and the larger must be a multiple of the "
            "smaller; try --vision tp=4,dp=3 --language tp=4,dp=3",
        ),
        (
            "--global-batch-size 6",
            "a microbatch of 6 samples (global batch 6 / 1 microbatches) does not divide over "
            "vision dp=4; try --vision tp=2,dp=4 --language tp=2,cp=2,dp=2 --global-batch-size 8",
        ),
        (
            "--micro-batches 5",
            "a global batch of 32 samples does not divide into 5 microbatches; "
            "try --vision tp=2,dp=4 --language tp=2,cp=2,dp=2 --global-batch-size 40",
        ),
        (
            "--eval-batch-size 6",
            "an evaluation batch of 6 samples does not divide over vision dp=4; "
            "try --vision tp=2,dp=4 --language tp=2,cp=2,dp=2 --eval-batch-size 8",
        ),
        (
            "--vision tp=16,dp=1 --language tp=2,cp=8,dp=1",
            "vision tp=16 does not divide its 8 attention heads; "
            "try --vision tp=8,dp=2 --language tp=2,cp=8,dp=1",
        ),
        (
            "--vision tp=3,dp=1 --language tp=1,cp=3",
            "vision tp=3 does not divide its 8 attention heads; "
            "try --vision tp=2,dp=1 --language tp=1,cp=2,dp=1",
        ),
        (
            "--vision tp=1,dp=6 --language tp=1,cp=3,dp=2 --global-batch-size 6 "
            "--eval-batch-size 6",
            "a sequence of 32 tokens does not divide by 2 * cp=3 = 6; "
            "try --vision tp=1,dp=6 --language tp=1,cp=2,dp=3",
        ),
        (
            "--vision tp=8,dp=8 --language tp=8,cp=8,dp=1 --sequence-parallel",
            "a sequence of 32 tokens does not divide by 2 * cp=8 * tp=8 = 128; "
            "try --vision tp=8,dp=8 --language tp=8,cp=2,dp=4",
        ),
        (
            "--vision tp=2,cp=8,dp=1 --language tp=2,cp=2,dp=4",
            "vision tp=2 * cp=8 does not divide its 8 attention heads; "
            "try --vision tp=2,dp=8 --language tp=2,cp=2,dp=4",
        ),
        (
            "--vision tp=1,dp=8 --language tp=1,cp=2,dp=4,ep=2",
            "language tp=1,cp=2,dp=4,ep=2 shares out experts, and the model has none: give "
            "--experts; try --vision tp=1,dp=8 --language tp=1,cp=2,dp=4",
        ),
        (
            "--vision tp=1,dp=8 --language tp=1,dp=8,ep=4 --experts 6",
            "language ep=4 does not divide its 6 experts; "
            "try --vision tp=1,dp=8 --language tp=1,dp=8",
        ),
        (
            "--language tp=2,cp=2,dp=2,ep=8 --experts 8 --sequence-parallel",
            "language ep=8 with 2 ranks for each expert does not divide its 8 ranks; "
            "try --vision tp=2,dp=4 --language tp=2,cp=2,dp=2",
        ),
        (
            "--vision tp=1,dp=8 --language tp=1,cp=2,pp=2,dp=2,ep=8 --experts 8",
            "language ep=8 with 1 rank for each expert does not divide its 4 ranks of a stage; "
            "try --vision tp=1,dp=8 --language tp=1,cp=2,pp=2,dp=2",
        ),
        (
            "--experts 4",
            "language tp=2 with experts needs --sequence-parallel; "
            "try --vision tp=2,dp=4 --language tp=1,cp=2,dp=4",
        ),
        (
            "--vision tp=1,dp=8 --language tp=1,cp=2,pp=4,dp=1 --bridge routed",
            "language pp=4 does not divide its 2 layers into equal stages; "
            "try --vision tp=1,dp=8 --language tp=1,cp=2,dp=4",
        ),
        (
            "--nproc 4",
            "vision tp=2,dp=4 and language tp=2,cp=2,dp=2 span 8 ranks, but the job has 4 ranks; "
            "try --vision tp=2,dp=2 --language tp=2,cp=2,dp=1",
        ),
        (
            "--audio tp=1,dp=4",
            "audio tp=1,dp=4 spans 4 ranks, language tp=2,cp=2,dp=2 spans 8, and both must span "
            "the same ranks; try --vision tp=2,dp=4 --audio tp=1,dp=8 --language tp=2,cp=2,dp=2",
        ),
        (
            "--audio tp=4,cp=4,dp=1 --vision tp=2,dp=8 --language tp=2,cp=2,dp=4",
            "audio tp=4 * cp=4 does not divide its 8 attention heads; "
            "try --vision tp=2,dp=8 --audio tp=4,dp=4 --language tp=2,cp=2,dp=4",
        ),
        (
            "--vision tp=4,dp=3 --audio tp=6,dp=2 --language tp=4,dp=3 --global-batch-size 12 "
            "--eval-batch-size 12",
            "audio dp=2 and language dp=3 do not divide, and the larger must be a multiple of the "
            "smaller; try --vision tp=4,dp=3 --audio tp=4,dp=3 --language tp=4,dp=3",
        ),
        (
            "--audio tp=1,dp=8 --micro-batches 8",
            "a microbatch of 4 samples (global batch 32 / 8 microbatches) does not divide over "
            "audio dp=8; try --vision tp=2,dp=4 --audio tp=1,dp=8 --language tp=2,cp=2,dp=2 "
            "--global-batch-size 64",
        ),
        (
            "--audio tp=1,dp=8 --eval-batch-size 4",
            "an evaluation batch of 4 samples does not divide over audio dp=8; "
            "try --vision tp=2,dp=4 --audio tp=1,dp=8 --language tp=2,cp=2,dp=2 "
            "--eval-batch-size 8",
        ),
        (
            "--vision tp=1,dp=16 --audio tp=16,dp=1 --language tp=2,cp=8,dp=1",
            "audio tp=16 does not divide its 8 attention heads; "
            "try --vision tp=1,dp=16 --audio tp=8,dp=2 --language tp=2,cp=8,dp=1",
        ),
        (
            "--audio tp=1,dp=8 --nproc 4",
            "vision tp=2,dp=4 and language tp=2,cp=2,dp=2 span 8 ranks, but the job has 4 ranks; "
            "try --vision tp=2,dp=2 --audio tp=1,dp=4 --language tp=2,cp=2,dp=1",
        ),
    ],
)
def test_layouts_that_do_not_fit(arguments: str, message: str) -> None:
    with pytest.raises(JobError) as refused:
        parse_options(arguments.split())
    assert str(refused.value) == message
    suggested = re.sub(r".*; try ", "", message).split()
    names = [word for word in suggested if word.startswith("--")]
    kept = arguments.split()
    for name in [*names, "--nproc"]:  # what the sentence says replaces what was given
        if name in kept:
            place = kept.index(name)
            del kept[place : place + 2]
    parse_options([*kept, *suggested])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--bridge gather --experts 4 --language cp=2,pp=2,dp=2,ep=2",
            "--experts 4 with --language pp=2 needs --bridge routed, got gather, which wants",
        ),
        (
            "--virtual-stages 2 --micro-batches 4 --language-layers 2",
            "pp=2 with 2 virtual stages each does not divide its 2 layers",
        ),
        ("--virtual-stages 2 --micro-batches 3", "2 interleaves groups of 2 microbatches, got"),
        ("--virtual-stages 2 --micro-batches 4 --encode-ahead 2", "needs --virtual-stages 1, got"),
        ("--language dp=8 --virtual-stages 2", "--virtual-stages is for a pipelined language"),
        ("--language dp=8 --encode-ahead 1", "--micro-batches 1 has no further ones; use 2 or"),
        ("--micro-batches 4 --encode-in-bubbles 3", "it can be at most 2"),
        ("--micro-batches 4 --encode-in-bubbles 1 --encode-ahead 1", "give one of them"),
        ("--micro-batches 4 --encode-in-bubbles 1 --bridge gather", "routed, got pp=2, 1 and gath"),
        ("--micro-batches 4 --encode-in-bubbles 1 --virtual-stages 2", "got pp=2, 2 and routed"),
        ("--language dp=8 --micro-batches 4 --encode-in-bubbles 1", "got pp=1, 1 and routed"),
    ],
)
def test_what_a_pipelined_language_model_needs(arguments: str, message: str) -> None:
    base = "--language cp=2,pp=2,dp=2 --language-layers 4 --global-batch-size 96"
    with pytest.raises(JobError, match=message):
        parse_options([*base.split(), *arguments.split()])
    options = _parse(f"{base} --virtual-stages 2 --micro-batches 4")
    assert (options.language.pp, options.virtual_stages) == (2, 2)
    assert _parse(f"{base} --micro-batches 4 --encode-ahead 1").encode_ahead == 1
    assert _parse(f"{base} --encode-ahead 1").micro_batches == 1
    assert _parse(f"{base} --micro-batches 4 --encode-in-bubbles 2").encode_in_bubbles == 2
    one_stage = "--language dp=8 --global-batch-size 96 --micro-batches 2 --encode-ahead 1"
    assert _parse(one_stage).encode_ahead == 1
    assert _parse(f"{base} --bridge gather").language.pp == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--bridge gather", "--varied-samples needs --bridge routed, got gather"),
        (
            "--language cp=2,pp=2,dp=2 --language-layers 4 --micro-batches 4 --virtual-stages 2 "
            "--packed",
            "--varied-samples with --packed and --virtual-stages 2 needs more than two pipeline",
        ),
    ],
)
def test_what_samples_of_different_lengths_need(arguments: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        _parse(f"--varied-samples {arguments}")
    options = _parse("--varied-samples --packed --language cp=2,pp=2,dp=2")
    assert options.varied_samples
    assert options.packed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--audio tp=1,dp=8 --bridge gather",
            r"^--bridge gather wants equally many rows of every sample where DP sizes differ, and "
            r"with --audio some .*; got vision dp=4, audio dp=8, language dp=2; use --bridge rou",
        ),
        (
            "--vision tp=2,cp=2,dp=2 --bridge gather",
            r"^vision has cp=2, and --bridge gather wants whole images .*; use --bridge routed",
        ),
        (
            "--vision tp=2,cp=2,dp=2 --memory-plan",
            r"^--memory-plan counts whole images and vision has cp=2; plan with tp=2,dp=4$",
        ),
        (
            "--freeze audio-projector+language",
            r"^--freeze audio-projector is for a run with sounds; add --audio tp=1,dp=8$",
        ),
        (
            "--freeze vision-encoder+projector+language",
            r"^--freeze: must leave something to train, got 'vision-encoder\+projector\+language'$",
        ),
        (
            "--audio dp=8 --freeze encoder+vision-projector+audio-projector+language",
            r"^--freeze: must leave something to train, got 'encoder\+vision-projector\+audio-pro",
        ),
    ],
)
def test_what_an_audio_encoder_does_not_go_with(arguments: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        parse_options(arguments.split())


def test_what_an_audio_encoder_goes_with() -> None:
    same = "--vision tp=2,dp=4 --audio tp=2,dp=4 --language tp=2,dp=4 --bridge gather"
    assert _parse(same).audio == Layout(tp=2, dp=4)
    kept = _parse("--audio dp=8 --freeze vision-encoder+vision-projector+language")
    assert kept.freeze == "vision-encoder+vision-projector+language"
    assert kept.as_dict()["audio"] == "tp=1,dp=8"
    one = "--vision dp=1 --audio dp=1 --language dp=1"
    assert _parse(f"{one} --micro-batches 32").world_size == 1


@pytest.mark.parametrize("world", [None, 6, 8])
def test_every_suggestion_of_three_layouts_fits(world: int | None) -> None:
    limits = limits_of(24, 2, 20, world_size=world)
    refused = 0
    for sizes in itertools.product((1, 2, 3), (1, 2), (1, 4), (2, 6), (1, 3, 8), (1, 2, 4)):
        vision, audio = Layout(tp=sizes[0], dp=sizes[5]), Layout(sizes[3], sizes[1], sizes[4])
        layouts = pair(vision, Layout(cp=sizes[1], dp=sizes[2] * sizes[4]), audio)
        if not misfits(layouts, limits):
            continue
        refused += 1
        better, rounded = suggest(layouts, limits)
        assert "audio" in better.encoders
        assert misfits(better, rounded) == []
    assert refused > 200


def test_layouts_that_fit_no_batch_of_the_given_ranks_change_the_batch_too() -> None:
    with pytest.raises(
        JobError, match=r"has 5 ranks; try --vision tp=1,dp=5 .*-size 35 .*-size 35$"
    ):
        parse_options([], 5)
    batches = "--global-batch-size 35 --eval-batch-size 35"
    assert _parse(f"--vision tp=1,dp=5 --language tp=1,dp=5 {batches}", 5).world_size == 5


@pytest.mark.parametrize("world", [None, 6, 8])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_suggestion_fits(world: int | None, sequence_parallel: bool) -> None:
    limits = limits_of(24, 2, 20, sequence_parallel, world)
    refused = 0
    for vision in itertools.product((1, 2, 3, 8), (1, 2), (1, 3, 4)):
        for language in itertools.product((1, 2, 6), (1, 2, 3, 8), (1, 2, 4)):
            layouts = pair(Layout(*vision), Layout(*language))
            if not misfits(layouts, limits):
                check_layouts(layouts, limits)
                continue
            refused += 1
            better, rounded = suggest(layouts, limits)
            assert misfits(better, rounded) == []
            assert better.language.size == (world or better.language.size)
            parse = [Layout.parse(text, name) for name, text in _parts(suggestion(layouts, limits))]
            assert pair(*parse) == better
    assert refused > 700


def _parts(text: str) -> list[tuple[str, str]]:
    return re.findall(r"--(vision|language) (\S+)", text)


def test_a_suggestion_for_many_ranks_is_quick() -> None:
    # 7,560 ranks have 64 divisors: about as many layouts as any number of ranks allows.
    start = time.process_time()
    suggestion(pair(Layout(dp=7560), Layout(tp=7560, cp=2)), limits_of(32, 1, 32))
    assert time.process_time() - start < 10.0


@pytest.mark.parametrize("cp", [1, 2, 4, 8])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_sequence_rule_is_the_models(cp: int, tp: int, sequence_parallel: bool) -> None:
    layouts = pair(Layout(tp=tp, dp=cp), Layout(tp=tp, cp=cp))
    refused = misfits(layouts, limits_of(32, sequence_parallel=sequence_parallel))
    assert bool(refused) == bool(32 % shard_factor(cp, tp if sequence_parallel else 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--vision tp=2,pp=2", r"--vision 'tp=2,pp=2': 'pp=2' is not an .* axes are tp, cp, dp,"),
        ("--audio tp=2,pp=2", r"--audio 'tp=2,pp=2': 'pp=2' is not an .* axes are tp, cp, dp,"),
        ("--vision 8", r"'8' is not an axis and its size"),
        ("--language tp=2,", r"'' is not an axis and its size; the axes are tp, cp, pp, dp,"),
        ("--language tp=2,tp=2", r"tp is given twice; give it once"),
        ("--language tp=0", r"tp must be a whole number from 1 to 16384, got '0'"),
        ("--language tp=-2", r"tp must be a whole number from 1 to 16384, got '-2'"),
        ("--language dp=1.5", r"dp must be a whole number from 1 to 16384, got '1.5'"),
        ("--language dp=²", r"dp must be a whole number from 1 to 16384, got '²'"),
        ("--vision dp=99999999999999999999", r"dp must be a whole number from 1 to 16384"),
        ("--steps 0", r"--steps: must be a whole number from 1 to 2147483647, got '0'"),
        ("--seed -1", r"--seed: must be a whole number from 0 to 2147483647, got '-1'"),
        ("--lr 0", r"--lr: must be a number above 0, got '0'"),
        ("--lr nan", r"--lr: must be a number above 0, got 'nan'"),
        ("--dropout 1", r"--dropout: must be a number from 0 to below 1, got '1'"),
        (
            "--freeze encoder+head",
            r"--freeze: must be parts of encoder, lower-encoder, projector, language, "
            r"vision-encoder, .*, audio-projector, joined by '\+', got 'encoder\+head'",
        ),
        (
            "--freeze encoder+projector+language",
            r"--freeze: must leave something to train, got 'encoder\+projector\+language'",
        ),
        ("--clip-grad -1", r"--clip-grad: must be a number at least 0, got '-1'"),
        ("--dtype float64", r"--dtype: invalid choice: 'float64'"),
        ("--step 3", r"unrecognized arguments: --step 3; --help lists all options"),
        ("--vision", r"--vision: expected one argument"),
    ],
)
def test_options_that_cannot_be_read(arguments: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        parse_options(arguments.split())


def test_nproc_must_agree_with_the_ranks_that_torchrun_started() -> None:
    assert parse_options(["--nproc", "8"], 8).nproc == 8
    with pytest.raises(JobError, match="--nproc 4 was given, but 8 ranks were started; leave it"):
        parse_options(["--nproc", "4"], 8)


def test_an_encoder_that_cannot_cut_its_items_is_told_so() -> None:
    pair = Layouts({"vision": Layout(tp=2, cp=2, dp=2)}, Layout(tp=2, cp=2, dp=2))
    (said,) = misfits(pair, Limits(8, items={"vision": "images"}))
    assert said == (
        "vision has cp=2, but its encoder does not cut images over CP, and cp must be 1"
    )
    assert misfits(pair, Limits(8, cut_items=("vision",))) == []


def test_a_suggestion_keeps_the_cp_of_an_encoder_that_can_be_cut() -> None:
    pair = Layouts({"vision": Layout(tp=2, cp=2, dp=4)}, Layout(tp=2, cp=2, dp=2))
    for cut, said in (((), "tp=2,dp=4"), (("vision",), "tp=2,cp=2,dp=2")):
        limits = Limits(8, world_size=8, cut_items=cut)
        assert suggestion(pair, limits) == f"--vision {said} --language tp=2,cp=2,dp=2"
    two = Layouts({**pair.encoders, "audio": Layout(cp=4, dp=4)}, pair.language)
    better, _ = suggest(two, Limits(8, world_size=8, cut_items=("audio",)))
    assert better.encoders == {"vision": Layout(tp=2, dp=4), "audio": Layout(cp=4, dp=2)}
    assert len(list(every_pair(4, cps=(1, 2)))) == 30


def test_another_encoder_is_suggested_by_its_name() -> None:
    asked = Layouts({"radar": Layout(tp=3)}, Layout(dp=2))
    assert suggestion(asked, Limits(2)) == "--radar tp=2,dp=1 --language tp=1,dp=2"
    halves = Layouts({"radar": Layout(dp=2)}, Layout(dp=2))
    said = suggestion(halves, Limits(2, eval_batch_size=3))
    assert said == "--radar tp=1,dp=2 --language tp=1,dp=2 --eval-batch-size 4"
    assert str(next(every_pair(2, encoder="radar"))).startswith("--radar tp=1,dp=2 ")


def test_a_layout_is_written_as_it_is_read() -> None:
    layout = Layout(tp=2, cp=2, dp=2, ep=4, etp=1, pp=2)
    assert str(layout) == "tp=2,cp=2,pp=2,dp=2,ep=4,etp=1"
    assert Layout.parse(str(layout), "language") == layout


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_options(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in Options.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
