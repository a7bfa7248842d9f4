# SPDX-License-Identifier: Apache-2.0
"""``mimo train`` with tiny models, as a user types it: on one process and on 8 ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron.core.models.mimo.data.easy_vqa import EasyVqa
from mimo_colocated import phases
from mimo_colocated.train.clock import PARTS
from mimo_colocated.train.report import write_report
from studies.easy_vqa import differing
from tests.faults.starts import LAUNCH_VARIABLES
from tests.harness import programs
from tests.unit_tests.mimo.train import strangers
from tests.unit_tests.mimo.train.traces import phases_of, read_trace

TIMEOUT_S = 500
STEPS = 20
IMAGES = 3
# One process, and the layouts of the recipe; 4 ranks with other sizes.
ALONE = {"layout.language": "dp=1", "layout.encoders": "{images: dp=1}"}
EIGHT: dict[str, Any] = {"layout.sequence_parallel": True}
FOUR = {"layout.language": "tp=2,dp=2", "layout.encoders": "{images: dp=4}", "data.packed": False}
# Every image is cut over two ranks; its attention has 4 heads.
ENCODER_CP = {**EIGHT, "layout.encoders": "{images: 'tp=2,cp=2,dp=2'}", "data.workers": 1}
STAGES: dict[str, Any] = {
    "layout.language": "pp=2,dp=2",
    "layout.encoders": "{images: 'tp=2,dp=2'}",
    "training.micro_batches": 2,
    "training.encode_ahead": 1,
}
TINY = {
    "model.settings": "{width: 32, layers: 2, vision_width: 32, vision_layers: 2, patch: 16}",
    "training.steps": STEPS,
    "training.global_batch_size": 8,
    "training.warmup_steps": 2,
    "training.save_every": STEPS // 2,
    "data.train.0.settings.images": 60,
    "data.train.0.settings.draws": 1,
    "data.packed": True,
    "data.held_out.0.settings.images": IMAGES,
    "evaluation.batch": 24,
    "evaluation.without_images": False,
}


def train(
    out: Path, changes: dict[str, Any], *more: str, recipe: str = "easy-vqa"
) -> SimpleNamespace:
    """Run the command; what it printed, its error, its exit code."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES}
    values = {**(TINY if recipe == "easy-vqa" else {}), **changes, "run.out": out}
    given = ["-m", "mimo_colocated", "train", recipe, *more]
    for name, value in values.items():
        given += ["--set", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    done: subprocess.CompletedProcess[str] = programs.run(
        given, Path.cwd(), environment, timeout=TIMEOUT_S
    )
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, images read by a process beside it."""
    out = tmp_path_factory.mktemp("alone") / "run"
    done = train(out, {**ALONE, "data.workers": 1, "run.tensorboard": True})
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of 8 ranks, vision TP2 DP4 and language TP2 CP2 DP2; two of them record steps."""
    out = tmp_path_factory.mktemp("eight") / "run"
    done = train(out, EIGHT, "--profile", "3-4", "--profile-ranks", "0,5")
    assert done.code == 0, done.err
    assert "training data: 60 samples, skipped: none" in done.out
    assert f"wrote {out / 'profile'}, for https://ui.perfetto.dev" in done.out
    assert re.search(r"step 20/20 .* GFLOP/s per rank .*language \d+%.* left", done.out)
    return out


def test_eight_ranks_follow_one_process(alone: Path, eight: Path) -> None:
    # Adam divides by the gradient's size, so rounding grows a little from step to step.
    assert losses(eight) == pytest.approx(losses(alone), rel=1e-4)
    assert losses(alone)[-1] < losses(alone)[0] - 0.5
    for one, other in zip(metrics(alone), metrics(eight), strict=True):
        for name in ("step", "tokens", "counted_tokens", "samples", "images"):
            assert one[name] == other[name], name
        assert one["images"] == one["samples"] == 8
        assert one["waited_s"] >= 0
        # The same work whatever the layout; two CP ranks would run every image.
        assert one["tflop"] == other["tflop"]
        assert one["tflop_repeated"] == 0
        assert other["tflop_repeated"] == pytest.approx(other["tflop"]["images"])
        assert "mfu" not in one
        for line in (one, other):
            assert sum(line["times"].values()) == pytest.approx(line["seconds"])
            assert set(line["times"]) == {*PARTS.values(), "other"}
            assert all(part > 0 for name, part in line["times"].items() if name != "bridge")
        # Of 8 ranks what is told is that of the one that waited longest, and rank 0's times.
        assert one["times"]["data"] >= one["waited_s"]
        assert other["waited_s"] >= 0
        assert one["spread_before"] == one["spread_after"] == {"images": 1.0}
        assert other["times"]["bridge"] > 0
        # Two replicas of the encoder share the images of one of the language model.
        assert other["spread_before"]["images"] >= other["spread_after"]["images"] >= 1.0
        norms = one["grad_norms"]
        assert norms == pytest.approx(other["grad_norms"], rel=1e-3)
        assert sum(each**2 for each in norms.values()) == pytest.approx(one["grad_norm"] ** 2)
    assert answers(eight) == answers(alone)
    summaries = [json.loads((out / "summary.json").read_text()) for out in (alone, eight)]
    assert summaries[0]["held_out_loss"] == pytest.approx(summaries[1]["held_out_loss"], rel=1e-4)
    assert all(0 <= summary["waiting_for_data"] < 1 for summary in summaries)
    for name in ("questions", "exact_match", "majority_answer", "skipped"):
        assert summaries[0][name] == summaries[1][name]
    assert summaries[1]["layouts"]["images"] == {"tp": 2, "cp": 1, "pp": 1, "dp": 4}


def test_encoder_cp_follows_one_process(alone: Path, tmp_path: Path) -> None:
    done = train(tmp_path / "run", ENCODER_CP)
    assert done.code == 0, done.err
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)
    assert answers(tmp_path / "run") == answers(alone)
    for one, other in zip(metrics(alone), metrics(tmp_path / "run"), strict=True):
        assert one["tflop"] == other["tflop"]
        assert one["images"] == other["images"]
        assert one["grad_norms"] == pytest.approx(other["grad_norms"], rel=1e-3)
    both = alone, tmp_path / "run"
    summaries = [json.loads((out / "summary.json").read_text()) for out in both]
    assert summaries[0]["held_out_loss"] == pytest.approx(summaries[1]["held_out_loss"], rel=1e-4)
    assert summaries[1]["layouts"]["images"] == {"tp": 2, "cp": 2, "pp": 1, "dp": 2}
    one, other = weights(alone / "exported"), weights(tmp_path / "run" / "exported")
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)


def test_pipeline_stages_follow_one_process(alone: Path, tmp_path: Path) -> None:
    """Each replica packs its samples, so microbatches have several lengths."""
    done = train(tmp_path / "run", STAGES)
    assert done.code == 0, done.err
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)
    assert answers(tmp_path / "run") == answers(alone)
    both = alone, tmp_path / "run"
    summaries = [json.loads((out / "summary.json").read_text()) for out in both]
    assert summaries[0]["held_out_loss"] == pytest.approx(summaries[1]["held_out_loss"], rel=1e-4)
    assert summaries[1]["layouts"]["language"] == {"tp": 1, "cp": 1, "pp": 2, "dp": 2}
    one, other = weights(alone / "exported"), weights(tmp_path / "run" / "exported")
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)


def test_tensorboard_has_the_same_numbers(alone: Path) -> None:
    events = EventAccumulator(str(alone / "tensorboard"))
    events.Reload()
    found = [(each.step, each.value) for each in events.Scalars("loss")]
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    # Events are in float32.
    assert [value for _, value in found] == pytest.approx(losses(alone), rel=1e-6)
    names = {"tflop/images", "grad_norms/language", "peak_memory", "times/encoder"}
    assert names | {"spread_after/images"} <= set(events.Tags()["scalars"])


def test_a_trace_names_the_phases(eight: Path) -> None:
    """In the order of a step, each within its step, operators within them, on either rank."""
    assert sorted(path.name for path in (eight / "profile").iterdir()) == [
        "steps_3-4.rank_0.json.gz",
        "steps_3-4.rank_5.json.gz",
    ]
    for path in (eight / "profile").iterdir():
        steps, spans = read_trace(path)
        assert [step.name for step in steps] == ["step 3", "step 4"]
        for step in steps:
            found = phases_of(step, spans)
            names = [span.name for span in found if span.name != phases.BETWEEN]
            assert list(dict.fromkeys(names)) == [
                *(phases.DATA, phases.ENCODER_FORWARD, phases.BRIDGE_FORWARD),
                *(phases.LANGUAGE_FORWARD, phases.LANGUAGE_BACKWARD, phases.BRIDGE_BACKWARD),
                *(phases.ENCODER_BACKWARD, phases.FINALIZE, phases.OPTIMIZER),
            ]
            for name in (phases.ENCODER_FORWARD, phases.LANGUAGE_FORWARD):
                within = {
                    operator.name
                    for span in found
                    for operator in spans.operators
                    if span.name == name and span.holds(operator)
                }
                assert "aten::mm" in within or "aten::addmm" in within


def answers(out: Path) -> list[dict[str, str]]:
    return json.loads((out / "answers.json").read_text())["answers"]


def test_every_held_out_question_is_asked_once(eight: Path) -> None:
    """Their number is no multiple of a batch: an odd tail is asked, too, and nothing twice."""
    wanted = [pairs[0] for pairs in EasyVqa("test", together=False, images=IMAGES).questions]
    assert len(wanted) % TINY["evaluation.batch"]
    assert [(each["question"], each["wanted"]) for each in answers(eight)] == wanted


def test_the_exported_model_answers_the_same(eight: Path, tmp_path: Path) -> None:
    assert differing(eight, range(0, len(answers(eight)), 3)) == []
    # What differs is seen.
    (tmp_path / "exported").symlink_to(eight / "exported")
    other = [{**each, "said": each["said"] + "!"} for each in answers(eight)]
    (tmp_path / "answers.json").write_text(json.dumps({"answers": other}))
    assert [ours for _, ours, _ in differing(tmp_path, [1])] == [other[1]["said"]]


def mimo(*arguments: object, ranks: int = 0) -> str:
    """Run another command; what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES}
    given = ["-m", "mimo_colocated", *map(str, arguments)]
    done = programs.run(given, Path.cwd(), environment, timeout=TIMEOUT_S, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.once
def test_a_run_is_evaluated_in_any_layout_on_any_ranks(alone: Path, tmp_path: Path) -> None:
    """The checkpoint of one process, on one and on 8 ranks: what the run said at its end."""
    summary = json.loads((alone / "summary.json").read_text())
    layouts = ("--vision", "tp=2,dp=4", "--language", "tp=2,cp=2,dp=2")
    for name, layout in (("one", ()), ("eight", layouts)):
        said = mimo("eval", alone, "--out", tmp_path / name, *layout)
        assert f"exact match: {summary['exact_match']:.6g}\n" in said
        found = json.loads((tmp_path / name / "evaluation.json").read_text())
        assert (found["step"], found["questions"]) == (STEPS, summary["questions"])
        assert found["held_out_loss"] == pytest.approx(summary["held_out_loss"], rel=1e-5)
        assert found["answers"] == answers(alone)
    # The control: another checkpoint of the run.
    middle = alone / "checkpoints" / f"step_{STEPS // 2:08d}"
    mimo("eval", middle, "--set", "evaluation.samples=2", "--source", alone / "model")
    found = json.loads((alone / "evaluation" / "evaluation.json").read_text())
    assert (found["step"], found["questions"]) == (STEPS // 2, 2)
    assert found["held_out_loss"] > summary["held_out_loss"] * 1.01


def test_a_question_is_answered_as_in_the_run(alone: Path) -> None:
    """By a checkpoint alone, by the exported folder under torchrun."""
    source = EasyVqa("test", together=False, images=IMAGES)
    image, asked = source[1].turns[0].parts
    given = ("--image", image.item.name, asked.text, "--max-new-tokens", "4")
    wanted = answers(alone)[1]["said"]
    assert mimo("generate", alone, *given) == f"{wanted}\n"
    said = mimo("generate", alone / "exported", "--language", "tp=2", *given, ranks=2)
    assert said == f"{wanted}\n"


def test_what_is_left_beside_a_run(eight: Path) -> None:
    recipe = (eight / "recipe.yaml").read_text()
    assert "global_batch_size: 8" in recipe
    assert "kind: easy-vqa" in recipe
    record = json.loads((eight / "run.json").read_text())
    assert record["ranks"] == 8
    assert record["layouts"]["language"]["cp"] == 2
    assert record["skipped"] == {}
    page = (eight / "report.html").read_text()
    assert page.count("<img ") == 7
    assert f"of {len(answers(eight))} are right" in page
    assert record["versions"]["transformers"] == transformers.__version__
    assert set(record["git"]) == {"commit", "changed"}
    memory = json.loads((eight / "summary.json").read_text())["peak_memory_by_rank"]
    assert len(memory) == 8
    assert f"{max(memory) / 2**30:.3g} GiB on rank {memory.index(max(memory))}" in page


def resumed(run: Path, to: Path, changes: dict[str, Any]) -> SimpleNamespace:
    """Go on from the checkpoint in the middle of a run, without what came after."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "checkpoints" / f"step_{STEPS:08d}")
    return train(to, {**changes, "data.held_out": "[]", "run.export": False})


@pytest.mark.once
def test_a_run_goes_on_in_another_layout_on_other_ranks(eight: Path, tmp_path: Path) -> None:
    done = resumed(eight, tmp_path / "run", FOUR)
    assert done.code == 0, done.err
    assert f"resuming after step {STEPS // 2}" in done.out
    assert "saved in another layout" in done.out
    assert losses(tmp_path / "run") == pytest.approx(losses(eight), rel=1e-4)


def test_a_run_does_not_go_on_with_other_data(alone: Path, tmp_path: Path) -> None:
    done = resumed(alone, tmp_path / "run", {**ALONE, "training.seed": 5})
    assert done.code == 1
    assert "holds a run with training.seed=1234, this one has 5; give --set" in done.err


@pytest.mark.once
def test_a_dry_run_says_what_would_run(tmp_path: Path, eight: Path) -> None:
    done = train(eight, EIGHT, "--dry-run", "--nodes", "2")
    assert done.code == 0, done.err
    assert "images    tp=2,dp=4  8 ranks, 4 replicas" in done.out
    assert "images rows stay within the ranks [0, 1, 2, 3] [4, 5, 6, 7]" in done.out
    assert re.search(r"fullest rank, on h100: about [\d.]+ [MG]iB \(weights [\d.]+ .iB, ", done.out)
    assert "torchrun --nproc-per-node 4 --nnodes 2 --rdzv-backend c10d" in done.out
    assert "-m mimo_colocated train easy-vqa --set 'model.settings={width: 32," in done.out
    done = train(eight, ENCODER_CP, "--dry-run")
    assert "images    tp=2,cp=2,dp=2  8 ranks, 2 replicas" in done.out
    assert "images rows stay within the ranks [0, 1, 2, 3] [4, 5, 6, 7]" in done.out
    native = {**ENCODER_CP, "model.torch_native": "[images]"}
    done = train(eight, native, "--dry-run")
    assert done.code == 2
    assert "images cp=2: a torch-native encoder takes whole items and is not cut" in done.err
    done = train(eight, EIGHT, "--dry-run", "--nodes", "3")
    assert done.code == 2
    assert "--nodes 3 does not divide the 8 ranks; 1, 2, 4, 8 would" in done.err


# ---- a job that is a program of its own ------------------------------------------------------


@pytest.mark.once
def test_digits_is_the_job_of_the_example(tmp_path: Path) -> None:
    """The same losses, to the digit, as the example's own command line."""
    layouts = {"language": "tp=1,dp=2", "vision": "tp=2,dp=1"}
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES}
    typed = [f"--{name}={at}" for name, at in layouts.items()]
    typed += ["--steps=4", "--no-evaluate", f"--out={tmp_path / 'example'}"]
    done = programs.run(
        ["examples/mimo/digits/train.py", *typed], Path.cwd(), environment, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    changes = {
        "layout.language": layouts["language"],
        "layout.encoders.vision": layouts["vision"],
        "training.steps": 4,
        "options.evaluate": False,
    }
    assert (done := train(tmp_path / "recipe", changes, recipe="digits")).code == 0, done.err
    assert losses(tmp_path / "recipe") == losses(tmp_path / "example")
    assert len(losses(tmp_path / "recipe")) == 4
    record = json.loads((tmp_path / "recipe" / "run.json").read_text())
    assert record["layouts"]["vision"] == {"tp": 2, "cp": 1, "pp": 1, "dp": 1}
    assert write_report(tmp_path / "recipe").read_text().count("<img ") == 3
    assert "steps: 4" in (tmp_path / "recipe" / "recipe.yaml").read_text()
    done = train(tmp_path / "recipe", {**changes, "training.seed": 5}, recipe="digits")
    assert done.code == 1
    assert "holds a run with --seed 1234, this one has 5" in done.err
# ---- links that lose packets ----------------------------------------------------------------

LOST_STEPS = 6
LOST: dict[str, Any] = {
    **EIGHT,
    "training.steps": LOST_STEPS,
    "training.save_every": LOST_STEPS // 2,
    "data.held_out.0.settings.images": 1,
}


@pytest.mark.once
def test_links_without_loss_leave_the_easy_vqa_run_as_it_is(eight: Path, tmp_path: Path) -> None:
    """Bit for bit: losses, answers, and every weight of what is exported."""
    done = train(tmp_path / "run", {**EIGHT, "lossy.rules": "[{loss: {rate: 0.0}}]"})
    assert done.code == 0, done.err
    assert losses(tmp_path / "run") == losses(eight)
    assert answers(tmp_path / "run") == answers(eight)
    assert "lossy links: " in done.out
    one, other = (weights(each / "exported") for each in (eight, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    links = json.loads((tmp_path / "run" / "links.json").read_text())
    assert {row["lost"] for row in links["counts"]} == {0}
    assert min(row["packets"] for row in links["counts"]) > 0


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose links lose packets and put old ones in their place."""
    place = tmp_path_factory.mktemp("lost")
    rules = [{"loss": "default", "replacement": "stale", "payload": 64}]
    speed = {"bits_per_second": 1e6}
    link = {"rules": rules, "seed": 3, "evaluation": "lossy", "speed": speed}
    (place / "link.yaml").write_text(json.dumps(link))
    done = train(place / "run", LOST, "--lossy", str(place / "link.yaml"))
    assert done.code == 0, done.err
    assert "seed 3; lossy evaluation" in done.out
    return place


@pytest.mark.once
def test_a_run_that_loses_packets_is_recorded_and_counted(lost: Path, eight: Path) -> None:
    assert losses(lost / "run")[0] != losses(eight)[0]
    assert "replacement: stale" in (lost / "run" / "recipe.yaml").read_text()
    found = json.loads((lost / "run" / "links.json").read_text())
    summary = json.loads((lost / "run" / "summary.json").read_text())["lossy"]
    assert summary == {name: value for name, value in found.items() if name != "rows"}
    kinds = {(row["direction"], row["collective"]) for row in summary["counts"]}
    assert {("forward", "exchange"), ("backward", "exchange"), ("forward", "gather")} <= kinds
    rows = [row for row in found["rows"] if row["rank"] == summary["step_time"]["rank"]]
    sent = sum(row["payload_bytes"] + 50 * row["packets"] for row in rows)
    assert summary["step_time"]["send_s"] == pytest.approx(8 * sent / 1e6 / LOST_STEPS)
    assert {row["rank"] for row in found["rows"]} == set(range(8))


@pytest.mark.once
def test_a_run_that_loses_packets_goes_on_bit_for_bit(lost: Path, tmp_path: Path) -> None:
    """From the checkpoint in its middle; and no run goes on with other links than it had."""
    shutil.copytree(lost / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{LOST_STEPS:08d}")
    link = ("--lossy", str(lost / "link.yaml"))
    done = train(tmp_path / "run", {**LOST, "lossy.seed": 4}, *link)
    assert done.code == 1
    assert "holds a run with lossy.seed=3, this one has 4" in done.err
    done = train(tmp_path / "run", LOST, *link)
    assert done.code == 0, done.err
    assert f"resuming after step {LOST_STEPS // 2}" in done.out
    assert metrics(tmp_path / "run")[-1]["grad_norm"] == metrics(lost / "run")[-1]["grad_norm"]
    assert losses(tmp_path / "run") == losses(lost / "run")
    one, other = (weights(each / "exported") for each in (lost / "run", tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "run" / "links.json").read_text() == (
        lost / "run" / "links.json"
    ).read_text()


# ---- two folders that have not met ----------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("strangers")
    strangers.write_folders(place)
    return place


def of_strangers(folders: Path, **more: Any) -> dict[str, Any]:
    return {
        "data.train": f"[{{kind: llava, settings: {{path: {folders / 'train.json'}}}}}]",
        "model.dtype": "float32",
        "training.steps": STEPS,
        "training.global_batch_size": 8,
        "training.warmup_steps": 1,
        "training.save_every": 0,
        **more,
    }


@pytest.fixture(scope="module")
def pretrained(folders: Path) -> Path:
    """The first stage, on one process: the projector alone trains."""
    named = f"images: {folders / 'images'}, language: {folders / 'language'}"
    changes = {
        **of_strangers(folders),
        **ALONE,
        "model.settings": f"{{{named}, image_token: {strangers.TOKEN}}}",
    }
    done = train(folders / "first", changes, recipe="llava-pretrain")
    assert done.code == 0, done.err
    return folders / "first"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.once
def test_the_first_stage_trains_the_projector_alone(folders: Path, pretrained: Path) -> None:
    before, after = weights(pretrained / "model"), weights(pretrained / "exported")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name}
    assert len(moved) == 4
    language = weights(folders / "language")
    assert all(
        any(torch.equal(value, other) for other in after.values()) for value in language.values()
    )
    assert losses(pretrained)[-1] < losses(pretrained)[0]


@pytest.mark.once
def test_the_second_stage_follows_one_process_on_eight_ranks(
    folders: Path, pretrained: Path
) -> None:
    changes = of_strangers(folders, **{"model.folder": pretrained / "exported"})
    alone, eight = folders / "alone", folders / "eight"
    for out, layout in ((alone, ALONE), (eight, {})):
        done = train(out, {**changes, **layout, "training.lr": 1e-3}, recipe="llava-finetune")
        assert done.code == 0, done.err
    assert losses(eight) == pytest.approx(losses(alone), rel=1e-4)
    assert losses(alone)[-1] < losses(alone)[0] - 0.5
    before, after = weights(pretrained / "exported"), weights(eight / "exported")
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {name for name in before if "vision_tower" in name}


def test_folders_that_cannot_be_joined_are_refused(folders: Path, tmp_path: Path) -> None:
    named = f"images: {folders / 'images'}, language: {folders / 'language'}"
    settings = {"model.settings": f"{{{named}, image_token: <eye>}}"}
    done = train(
        tmp_path / "run", {**of_strangers(folders), **ALONE, **settings}, recipe="llava-pretrain"
    )
    assert done.code == 2
    assert "model.settings.image_token='<eye>' is no token of" in done.err
    assert list((tmp_path / "run").glob("*")) == []


@pytest.mark.once
def test_images_of_any_size_train_packed_on_ranks_as_in_rows_on_one(folders: Path) -> None:
    """Qwen2.5-VL: positions count rows and columns, of every sample by itself."""
    strangers.write_qwen_vl(folders / "qwen")
    changes = {
        **of_strangers(folders, **{"training.steps": 6, "training.lr": 3e-3}),
        "model.folder": folders / "qwen",
        "model.freeze": "[]",
        "data.held_out": of_strangers(folders)["data.train"],
    }
    four = {"layout.language": "tp=2,cp=2", "layout.encoders": "{images: 'tp=2,dp=2'}"}
    layouts = {
        "qwen-alone": {**ALONE, "data.packed": False},
        "qwen-four": four,
        "qwen-stages": {**four, "layout.language": "cp=2,pp=2", "training.micro_batches": 2},
    }
    for name, layout in layouts.items():
        done = train(folders / name, {**changes, **layout}, recipe="qwen2.5-vl-sft")
        assert done.code == 0, done.err
    alone, *others = (folders / name for name in layouts)
    assert losses(alone)[-1] < losses(alone)[0] - 0.5
    for ranks in others:
        assert losses(ranks) == pytest.approx(losses(alone), rel=1e-4)
        assert answers(ranks) == answers(alone)


@pytest.mark.once
def test_sounds_train_on_ranks_as_on_one(folders: Path) -> None:
    """Qwen2-Audio on chat with audio parts; in stages too, where samples have no sound or two."""
    strangers.write_qwen_audio(folders / "qwen-audio")
    tones = f"[{{kind: chat, settings: {{path: {strangers.write_tones(folders)}}}}}]"
    changes = {
        **of_strangers(folders, **{"training.lr": 3e-3, "data.train": tones}),
        "model.folder": folders / "qwen-audio",
        "model.freeze": "[]",
        "data.held_out": tones,
        "evaluation.without_images": True,
    }
    four = {"layout.language": "tp=2,cp=2", "layout.encoders": "{audio: 'tp=2,dp=2'}"}
    stages = {"layout.language": "pp=2,dp=1", "layout.encoders": "{audio: dp=2}"}
    layouts = {
        "alone": {"layout.language": "dp=1", "layout.encoders": "{}", "data.packed": False},
        "four": {**four, "data.workers": 1},
        "stages": {**stages, "training.micro_batches": 2},
    }
    outs = [folders / f"tones-{name}" for name in layouts]
    for out, layout in zip(outs, layouts.values(), strict=True):
        done = train(out, {**changes, **layout}, recipe="qwen2-audio-sft")
        assert done.code == 0, done.err
    alone, *others = outs
    assert losses(alone)[-1] < losses(alone)[0] - 0.5
    for out in others:
        assert losses(out) == pytest.approx(losses(alone), rel=1e-4)
        assert answers(out) == answers(alone)
        assert [line["sounds"] for line in metrics(out)] == [
            line["sounds"] for line in metrics(alone)
        ]
    assert "sounds seen" in (alone / "report.html").read_text()


# ---- text alone -----------------------------------------------------------------------------


@pytest.mark.once
def test_a_language_model_with_experts_learns_token_files(tmp_path: Path) -> None:
    """A count upwards, which every layout learns alike."""
    sources = {}
    for name, count in (("train", 4000), ("held_out", 400)):
        (np.arange(count) % 97).astype(np.uint16).tofile(tmp_path / f"{name}.bin")
        settings = f"{{path: {tmp_path / name}.bin, length: 32}}"
        sources[f"data.{name}"] = f"[{{kind: tokens, settings: {settings}}}]"
    changes = {
        **sources,
        "model.settings": "{width: 32, layers: 4, heads: 4, inner: 48, vocabulary: 101, "
        "experts: 4}",
        "model.dtype": "float32",
        "training.steps": STEPS,
        "training.global_batch_size": 16,
        "training.micro_batches": 2,
        "training.warmup_steps": 1,
        "training.save_every": 0,
        "evaluation.batch": 8,
    }
    # Of stages each rank has two, which interleave.
    stages = {"layout.virtual_stages": 2}
    layouts = {"dp=1": {}, "tp=2,dp=2,ep=2,etp=1": {}, "tp=2,pp=2,dp=2,ep=2": stages}
    for layout, more in layouts.items():
        how = {"layout.language": layout, "layout.sequence_parallel": layout != "dp=1", **more}
        done = train(tmp_path / layout, {**changes, **how}, recipe="text")
        assert done.code == 0, done.err
        assert "training data: 124 samples, skipped: none" in done.out
    alone, *others = (tmp_path / layout for layout in layouts)
    assert losses(alone)[-1] < losses(alone)[0] - 0.2
    told = [json.loads((out / "summary.json").read_text()) for out in (alone, *others)]
    for out, summary in zip(others, told[1:], strict=True):
        assert losses(out) == pytest.approx(losses(alone), rel=1e-4)
        assert summary["held_out_loss"] == pytest.approx(told[0]["held_out_loss"], rel=1e-4)
        assert summary["layouts"]["language"]["ep"] == 2
        one, other = weights(alone / "exported"), weights(out / "exported")
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)


@pytest.mark.once
def test_a_model_that_pytorch_shards_follows_megatrons_layers(
    folders: Path, tmp_path: Path
) -> None:
    """The same folder and data: transformers' modules over TP alone and with FSDP, Megatron's on
    one process. A checkpoint of the former is exported by a rank that needs no layout of theirs."""
    lines = [
        [
            {"role": "user", "content": f"what colour is {colour}"},
            {"role": "assistant", "content": colour},
        ]
        for colour in [*strangers.COLOURS] * 8
    ]
    (tmp_path / "talk.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in lines))
    talk = f"[{{kind: chat, settings: {{path: {tmp_path / 'talk.jsonl'}}}}}]"
    changes = {
        **of_strangers(folders, **{"data.train": talk, "training.steps": 8}),
        "model.folder": folders / "language",
        "training.lr": 1e-2,
        "data.held_out": talk,
    }
    hows = {
        "megatron": {"layout.language": "dp=1", "model.torch_native": "[]"},
        "native": {"layout.language": "tp=2,dp=1"},
        "stages": {
            "layout.language": "pp=2,dp=1",
            "model.torch_native": "[]",
            "training.micro_batches": 2,
        },
        "fsdp": {"layout.language": "tp=2,dp=2", "training.save_every": 8},
    }
    for name, how in hows.items():
        done = train(tmp_path / name, {**changes, **how}, recipe="torch-native-sft")
        assert done.code == 0, done.err
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "megatron"), rel=1e-4)
        assert answers(tmp_path / name) == answers(tmp_path / "megatron")
        assert len(answers(tmp_path / name)) == len(lines)
    exported = tmp_path / "fsdp" / "exported"
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    given = ["-m", "mimo_colocated", "export", str(tmp_path / "fsdp"), str(tmp_path / "out")]
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES}
    done = programs.run(given, Path.cwd(), environment, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    one, other = (load_file(each / "model.safetensors") for each in (exported, tmp_path / "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
