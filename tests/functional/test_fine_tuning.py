# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning by recipes: what trains, how fast, and what comes after what; tiny models."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mimo_colocated.train.makers import make_model
from tests.faults.starts import LAUNCH_VARIABLES
from tests.functional.test_recipes import TIMEOUT_S, losses, metrics, train, weights
from tests.harness import programs
from tests.unit_tests.mimo.huggingface.lora_models import with_peft
from tests.unit_tests.mimo.train import strangers

STEPS = 8
GATE = "language_model.model.layers.1.mlp.gate_proj.weight"
GROUPS = (
    "[{parameters: [images.projector], lr: 5.0e-3}, "
    "{parameters: ['*.layers.1.mlp.*_proj.weight'], lr: 2.0e-3, weight_decay: 0.1}]"
)
LAYOUTS = {
    "alone": {"layout.language": "dp=1", "layout.encoders": "{images: dp=1}"},
    "four": {"layout.language": "tp=2,dp=2", "layout.encoders": "{images: 'tp=2,dp=2'}"},
    "stages": {
        "layout.language": "pp=2,dp=2",
        "layout.encoders": "{images: 'tp=2,dp=2'}",
        "training.micro_batches": 2,
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA folder of a tower and a language model that have not met, and data for it."""
    place = tmp_path_factory.mktemp("place")
    strangers.write_folders(place)
    settings = {"images": str(place / "images"), "language": str(place / "language")}
    make_model("llava", {**settings, "image_token": strangers.TOKEN}, place / "joined", 60)
    return place


def recipe(place: Path) -> dict[str, object]:
    return {
        "data.train": f"[{{kind: llava, settings: {{path: {place / 'train.json'}}}}}]",
        "model.dtype": "float32",
        "training.steps": STEPS,
        "training.global_batch_size": 8,
        "training.lr": 1e-3,
        "training.warmup_steps": 2,
        "training.save_every": STEPS // 2,
    }


def exported(run: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES}
    given = ["-m", "mimo_colocated", "export", str(run), str(folder)]
    return programs.run(given, Path.cwd(), environment, timeout=TIMEOUT_S)


@pytest.mark.once
def test_groups_and_frozen_names_go_on_in_another_layout(place: Path) -> None:
    changes = {
        **recipe(place),
        "model.folder": place / "joined",
        "model.freeze": "[images.encoder, '*embed_tokens*', language.decoder.final_layernorm]",
        "training.groups": GROUPS,
        "run.tensorboard": True,
    }
    out = place / "groups"
    done = train(out, {**changes, **LAYOUTS["alone"]}, recipe="llava-finetune")
    assert done.code == 0, done.err
    rates = [line["learning_rates"] for line in metrics(out)]
    expected = {"language": 1e-3, "language.groups.1": 2e-3, "images": 5e-3}
    assert rates[0] == dict.fromkeys(expected, 0.0)  # the warm-up is every group's
    assert rates[2] == pytest.approx(expected)
    assert all(line["learning_rate"] == line["learning_rates"]["language"] for line in metrics(out))
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    found = [each.value for each in events.Scalars("learning_rates/language.groups.1")]
    assert found == pytest.approx([each["language.groups.1"] for each in rates])
    before, after = weights(place / "joined"), weights(out / "exported")
    kept = {name for name in before if torch.equal(before[name], after[name])}
    frozen = ("vision_tower", "embed_tokens", "model.norm.")
    assert kept == {name for name in before if any(part in name for part in frozen)}

    for layout in ("four", "stages"):
        again = place / f"again-{layout}"
        shutil.copytree(out, again)
        shutil.rmtree(again / "checkpoints" / f"step_{STEPS:08d}")
        done = train(again, {**changes, **LAYOUTS[layout]}, recipe="llava-finetune")
        assert done.code == 0, done.err
        assert f"resuming after step {STEPS // 2}" in done.out
        assert [line["learning_rates"] for line in metrics(again)] == rates
        assert losses(again) == pytest.approx(losses(out), rel=1e-4)
        after = weights(again / "exported")
        assert kept == {name for name in before if torch.equal(before[name], after[name])}

    other = {**changes, **LAYOUTS["alone"], "training.groups": "[]"}
    done = train(again, other, recipe="llava-finetune")
    assert done.code == 1
    assert "holds a run with training.groups=[{'parameters'" in done.err


def test_a_name_of_nothing_is_one_sentence(place: Path, tmp_path: Path) -> None:
    changes = {**recipe(place), **LAYOUTS["four"], "model.folder": place / "joined"}
    done = train(tmp_path, {**changes, "model.freeze": "[images.encodr]"}, recipe="llava-finetune")
    assert done.code == 1
    assert "model.freeze: 'images.encodr' names no parameter of the model; did you mean" in done.err
    assert "Traceback" not in done.err


def test_a_second_stage_begins_with_the_weights_of_the_first(place: Path) -> None:
    """Out of its checkpoint, in another layout; its optimizer and its schedule begin anew."""
    first, second = place / "first", place / "second"
    changes = {**recipe(place), "model.folder": place / "joined", "run.export": False}
    done = train(first, {**changes, **LAYOUTS["four"]}, recipe="llava-finetune")
    assert done.code == 0, done.err
    assert not (first / "exported").exists()
    changes |= {
        "model.folder": "",
        "model.from_run": first,
        "training.groups": "[]",
        "run.export": True,
    }
    frozen = "[language, images.encoder]"
    begin = {**changes, **LAYOUTS["alone"], "model.freeze": frozen, "training.lr": 1e-9}
    # A first save that was interrupted is no checkpoint: the run begins as if it were not there.
    (second / "checkpoints" / ".saving_00000002").mkdir(parents=True)
    done = train(second, begin, recipe="llava-finetune")
    assert done.code == 0, done.err
    assert "starting anew" in done.out
    rates = [line["learning_rate"] for line in metrics(second)]
    assert rates[:3] == pytest.approx([0, 5e-10, 1e-9])  # from its own warm-up
    # What the first run came to, and not what it began with; the second barely moves.
    assert losses(second)[0] < losses(first)[0] - 0.1
    assert losses(second)[0] == pytest.approx(losses(first)[-1], abs=0.3)
    done = exported(first, place / "written")
    assert done.returncode == 0, done.stderr
    then, now = weights(place / "written"), weights(second / "exported")
    assert all(torch.equal(then[name], now[name]) for name in then if "projector" not in name)
    assert not torch.equal(weights(place / "joined")[GATE], now[GATE])

    for change, said in (
        ({"model.from_run": place / "joined"}, "joined is no checkpoint and no run"),
        ({"model.torch_native": "[language]", "data.packed": False}, "model.torch_native=[], this"),
    ):
        done = train(place / "refused", {**begin, **change}, recipe="llava-finetune")
        assert done.code == 2
        assert said in done.err
        assert "Traceback" not in done.err


@pytest.mark.once
def test_adapters_train_on_eight_ranks_as_on_one_and_leave_for_peft(place: Path) -> None:
    """On both modules, with a cut sequence; a run goes on, and a stage begins with them merged."""
    steps = 20
    changes = {
        **recipe(place),
        "model.folder": place / "joined",
        "model.freeze": "[]",
        "model.lora": "{rank: 4, alpha: 8, targets: [q_proj, v_proj, up_proj, down_proj, fc2]}",
        "training.steps": steps,
        "training.lr": 1e-2,
        "training.save_every": steps // 2,
    }
    names = ("alone", "eight", "stages", "again")
    alone, eight, stages, again = (place / f"lora-{name}" for name in names)
    for out, layout in ((alone, LAYOUTS["alone"]), (eight, {}), (stages, LAYOUTS["stages"])):
        done = train(out, {**changes, **layout}, recipe="llava-finetune")
        assert done.code == 0, done.err
        assert losses(out) == pytest.approx(losses(alone), rel=1e-4)
    assert losses(alone)[-1] < losses(alone)[0] - 0.3

    shutil.copytree(eight, again)
    shutil.rmtree(again / "checkpoints" / f"step_{steps:08d}")
    done = train(again, {**changes, **LAYOUTS["four"]}, recipe="llava-finetune")
    assert done.code == 0, done.err
    assert losses(again) == pytest.approx(losses(eight), rel=1e-4)

    base, merged = weights(place / "joined"), weights(eight / "exported")
    moved = {name for name in base if not torch.equal(base[name], merged[name])}
    targets = ("q_proj.weight", "v_proj.weight", "up_proj.weight", "down_proj.weight", "fc2.weight")
    assert moved == {name for name in base if name.endswith(targets)} - unused(base)
    kind = transformers.LlavaForConditionalGeneration
    by_peft = with_peft(kind.from_pretrained(place / "joined"), eight / "adapter")
    whole = kind.from_pretrained(eight / "exported").eval()
    inputs = {"input_ids": torch.arange(8).view(1, 8)}
    with torch.no_grad():
        expected, found = (model(**inputs).logits for model in (by_peft, whole))
        plain = kind.from_pretrained(place / "joined").eval()(**inputs).logits
    bound = 1e-5 * float(expected.abs().max())
    assert (expected - found).abs().max() <= bound
    assert (expected - plain).abs().max() > 100 * bound

    done = exported(eight, place / "lora-written")
    assert done.returncode == 0, done.stderr
    written = weights(place / "lora-written")
    assert all(torch.equal(written[name], merged[name]) for name in merged)
    second = {
        **recipe(place),
        **LAYOUTS["alone"],
        "model.from_run": eight,
        "model.folder": "",
        "training.steps": 3,
        "training.warmup_steps": 1,
        "training.save_every": 0,
    }
    done = train(place / "lora-second", second, recipe="llava-finetune")
    assert done.code == 0, done.err
    assert losses(place / "lora-second")[0] == pytest.approx(losses(eight)[-1], abs=0.3)
    assert losses(place / "lora-second")[0] < losses(eight)[0] - 0.3


def unused(names: Iterable[str]) -> set[str]:
    """The tower's last layer, which LLaVA does not use."""
    return {name for name in names if "vision_tower" in name and "layers.2." in name}
