# SPDX-License-Identifier: Apache-2.0
"""Recipes are read, changed and refused in one sentence; nothing of them is guessed."""

from __future__ import annotations

import dataclasses
import subprocess
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.core.models.mimo.data import sources
from mimo_colocated.launch import errors
from mimo_colocated.launch.errors import JobError, did_you_mean
from mimo_colocated.launch.layouts import Layout
from mimo_colocated.train import command, plan
from mimo_colocated.train.checks import DATA_KINDS
from mimo_colocated.train.job import RunOptions
from mimo_colocated.train.plan import check_data
from mimo_colocated.train.profile_steps import Profile
from mimo_colocated.train.reading import as_yaml, describe_shipped, read_recipe, shipped
from mimo_colocated.train.recipe import LinkPart, LossyPart, Recipe, TrainingPart
from mimo_colocated.train.record import git_state

pytestmark = pytest.mark.once

# Every field, none with the value that it has by default.
WHOLE: dict[str, Any] = {
    "name": "mine",
    "model": {
        "folder": "/models/mine",
        "dtype": "bfloat16",
        "freeze": ["images"],
        "torch_native": ["images"],
        "lora": {"rank": 8, "alpha": 32.0, "dropout": 0.1, "targets": ["q_proj"]},
    },
    "layout": {
        "language": "tp=2,cp=2,dp=2",
        "encoders": {"images": "tp=2,dp=4"},
        "sequence_parallel": True,
    },
    "data": {
        "train": [
            {"kind": "llava", "settings": {"path": "a.json"}, "weight": 0.5},
            {"kind": "chat", "settings": {"path": "b.jsonl"}},
        ],
        "held_out": [{"kind": "chat", "settings": {"path": "c.jsonl"}}],
        "max_tokens": 512,
        "skip": False,
        "look_at_images": False,
        "packed": True,
        "sequences": 8,
        "capacity": 1000,
        "workers": 2,
        "ahead": 4,
    },
    "training": {
        "steps": 10,
        "global_batch_size": 16,
        "micro_batches": 2,
        "lr": 1e-4,
        "min_lr": 1e-6,
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "clip_grad": 0.5,
        "seed": 7,
        "save_every": 5,
        "max_skipped": 2,
        "recompute": "full",
        "groups": [
            {"parameters": ["images"], "lr": 1e-3, "min_lr": 1e-5, "weight_decay": 0.0},
        ],
    },
    "evaluation": {"batch": 32, "answer_tokens": 16, "samples": 100, "without_images": True},
    "run": {
        "out": "runs/mine",
        "export": False,
        "tensorboard": True,
        "wandb": "ours",
        "backend": "gloo",
        "timeout": 60,
    },
    "lossy": {
        "rules": [
            {
                "layers": "language_model.*",
                "loss": {"rate": 0.1},
                "directions": ["forward"],
                "collectives": ["sum"],
                "replacement": "rescaled",
                "side": "receiver",
                "payload": 100,
                "common_mode": True,
            }
        ],
        "seed": 5,
        "evaluation": "lossy",
        "speed": {"bits_per_second": 1e9, "round_trip_s": 1e-3, "header_bytes": 20},
    },
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(WHOLE))
    return path


def test_a_file_becomes_a_recipe(file: Path) -> None:
    recipe = read_recipe(str(file))
    assert recipe.data.train[0].weight == 0.5
    assert recipe.data.train[1].weight == 1.0
    assert recipe.language == Layout(tp=2, cp=2, dp=2)
    assert recipe.encoders() == {"images": Layout(tp=2, dp=4)}
    for part, values in WHOLE.items():
        found = dataclasses.asdict(recipe)[part]
        if part != "data" and isinstance(values, dict):
            assert {name: found[name] for name in values} == values


def test_what_is_printed_is_the_same_recipe(file: Path, tmp_path: Path) -> None:
    recipe = read_recipe(str(file))
    again = tmp_path / "again.yaml"
    again.write_text(as_yaml(recipe))
    assert read_recipe(str(again)) == recipe
    printed = yaml.safe_load(as_yaml(recipe))
    assert set(printed["training"]) == {*WHOLE["training"], "encode_ahead", "encode_in_bubbles"}
    order = ["name", "model", "layout", "data", "training", "evaluation", "lossy", "run"]
    assert list(printed) == order  # that of the recipes that ship
    assert list(printed["data"])[:2] == ["train", "held_out"]


def test_fields_are_set_by_their_path(file: Path) -> None:
    changes = ["training.lr=3", "data.train.1.weight=2", "data.train.1.settings.a=6", "run.out=x=y"]
    recipe = read_recipe(str(file), changes)
    assert (recipe.training.lr, recipe.data.train[1].weight) == (3.0, 2.0)
    assert recipe.data.train[1].settings == {"path": "b.jsonl", "a": 6}
    assert recipe.run.out == "x=y"
    assert read_recipe(str(file), ["data.train=[{kind: easy-vqa}]"]).data.train[0].settings == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("trainin.lr=1", "trainin is no field of a recipe; did you mean training?"),
        ("training.larning_rate=1", "training.larning_rate is no field of a recipe; the fields of"),
        ("training.stesp=1", r"did you mean training\.steps\? the fields of training are steps"),
        ("data.train.0.wait=1", r"data\.train\.0\.wait is no field .* mean data\.train\.0\.weight"),
        ("data.train.2.weight=1", "'2' is no number of a list of 2, from 0"),
        ("training.lr.x=1", "--set training.lr.x: lr is a value and has no fields"),
        ("training.lr", "'training.lr' is not of the form path.to.field=value"),
        ("training.lr={", "is no YAML"),
        ("data.held_out=null", r"data\.held_out is null; \[\] is none of it, or leave it out"),
        ("training.lr=", r"training\.lr is null; give a value, or leave it out"),
        ("layout.language=", r"layout\.language|--language ''"),
        ("run.out=", r"run\.out is empty; give one"),
        ("name=", r"name is empty; give one"),
        ("run.backend=mpi", r"run\.backend='mpi' is none of auto, nccl, gloo"),
        ("training.steps=many", "training.steps.* many"),
        ("training.steps=0", "training.steps=0; it must be at least 1"),
        ("training.seed=-1", "training.seed=-1; it must be at least 0"),
        ("model.dtype=int8", "model.dtype='int8' is none of float32, bfloat16, float16"),
        ("model.make=easy-vqa", "folder='/models/mine' and model.make='easy-vqa' and .*set one"),
        ("training.recompute=all", "training.recompute='all' is none, selective or full"),
        ("training.recompute=selective", r"names \['images'\]; set training.recompute to full or"),
        ("data.held_out=[{kind: tokens}]", "kind tokens is not mixed with conversations"),
        ("model.torch_native=[language]", "takes no packed samples; set data.packed=false"),
        ("data.train=[]", "data.train names no data; give at least one"),
        ("data.capacity=100", r"at least 512 \(data\.max_tokens=512, .* got True and 100"),
        ("data.max_tokens=1023", r"at least 1024 .*=1023, padded to a multiple .* True and 1000"),
        ("data.sequences=0", "data.capacity=1000 is of packed sequences; set data.sequences, or"),
        ("data.train.0.kind=lava", "'lava' is no kind of data; did you mean llava.* webdataset"),
        ("data.held_out.0.kind=json", "'json' is no kind of data; the kinds are llava, chat"),
        ("data.train.0.weight=0", r"data\.train\.0\.weight=0\.0; it must be above 0"),
        ("data.train.1.weight=-1", r"data\.train\.1\.weight=-1\.0; it must be above 0"),
        ("data.train.1.weight=.inf", r"data\.train\.1\.weight=inf is no finite number"),
        ("data.held_out.0.weight=2", r"data\.held_out\.0\.weight=2\.0; .* seen once, leave it out"),
        ("training.lr=.nan", r"training\.lr=nan is no finite number"),
        ("training.weight_decay=.nan", r"training\.weight_decay=nan is no finite number"),
        ("training.weight_decay=-1", r"training\.weight_decay=-1\.0; it must be at least 0"),
        ("training.clip_grad=-1", r"training\.clip_grad=-1\.0; it must be at least 0"),
        ("training.warmup_steps=-5", r"training\.warmup_steps=-5; it must be at least 0"),
        ("training.warmup_steps=10", r"warmup_steps=10 leaves none of training\.steps=10 .* below"),
        ("training.min_lr=1", r"training\.min_lr=1\.0 is above training\.lr=0\.0001; set it to at"),
        ("training.groups.0.parameters=[]", r"training\.groups\.0: parameters names none; give a"),
        ("training.groups=[{parameters: [images]}]", r"groups\.0: nothing is set for \['images'\]"),
        ("training.groups.0.lr=.inf", r"groups\.0: lr=inf; it must be a finite number from 0"),
        ("training.groups.0.lr=1e-7", r"groups\.0: min_lr=1e-05 is above lr=1e-07; set it to at"),
        ("training.groups.0.rate=1", r"groups\.0\.rate is no field .* are parameters, lr, min_lr"),
        ("model.lora.rank=-1", r"model\.lora\.rank=-1; it must be at least 1, or 0 for no"),
        ("model.lora.rank=0", r"model\.lora\.dropout is of adapters, and rank=0 has none; set"),
        ("model.lora.targets=[]", r"model\.lora\.targets names none; give names of linear layers"),
        ("model.lora.target=[a]", r"model\.lora\.target is no field .* mean model\.lora\.targets"),
        ("model.from_run=runs/first", "folder='/models/mine' .*from_run='runs/first'; set one"),
        (
            "model={from_run: runs/a, torch_native: [images], lora: {rank: 1, targets: [a]}}",
            r"those of model\.torch_native=\['images'\] cannot; export that run and name its",
        ),
        ("model={from_run: runs/mine}", r"from_run='runs/mine' is this run's own run\.out; use"),
        ("model={from_run: runs/a, settings: {a: 1}}", "makes, and model.from_run is there alr"),
        ("model.settings.width=64", "are of what model.make makes, and model.folder="),
        ("model.folder=runs/./mine/exported", "is what the run writes; use another run.out"),
        ("data.packed=false", "needs data.packed=true and data.capacity"),
        ("data.sequences=6", r"data\.sequences=6 does not divide over 2 micro.* a multiple of 4"),
        ("layout.language=tp=1,dp=8", r"sequences=8 does not .* 8 language .* multiple of 16"),
        ("layout.encoders.images=dp=4", "images=tp=1,dp=4 spans 4 ranks and .* spans 8"),
        ("layout.virtual_stages=2", r"virtual_stages is for a pipelined language model; add pp=2"),
        ("training.encode_ahead=0", r"training\.encode_ahead=0; it must be at least 1"),
        ("layout.virtual_stages=0", r"layout\.virtual_stages=0; it must be at least 1"),
        ("layout.language=tp=x", "tp must be a whole number"),
        ("lossy.rules.0.los=1", r"mean lossy\.rules\.0\.loss\? the fields of lossy\.rules\.0 are"),
        ("lossy.rules.0.loss=on", "lossy.rules"),
        ("lossy.rules.0.loss=defult", r"0\.loss='defult' is no preset; did you mean default\?"),
        ("lossy.rules=[]", "lossy has no rules, so nothing would be lost; give lossy.rules, or"),
        ("lossy.evaluation=no", "lossy"),
        ("lossy.evaluation=none", "lossy.evaluation='none' is lossless or lossy"),
        ("lossy.seed=-1", "lossy.seed=-1; it must be at least 0"),
    ],
)
def test_what_is_wrong_is_refused_in_one_sentence(file: Path, change: str, said: str) -> None:
    with pytest.raises(JobError, match=said) as caught:
        read_recipe(str(file), [change])
    assert "\n" not in str(caught.value)


ROWS = ["data.packed=false", "data.sequences=0", "data.capacity=0"]
PACKED = ["data.sequences=0", "data.capacity=0"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            [*ROWS, "training.global_batch_size=6"],
            "training.global_batch_size=6 does not divide over 2 microbatches and 2 language "
            "replicas; use a multiple of 4",
        ),
        ([*ROWS, "evaluation.batch=3"], r"evaluation\.batch=3 does not .* a multiple of 2"),
        (
            [*PACKED, "training.global_batch_size=3"],
            "training.global_batch_size=3 leaves some of 4 packed sequences empty; use at least 4",
        ),
        ([*PACKED, "evaluation.batch=1"], r"evaluation\.batch=1 leaves some of 2 packed"),
        (["evaluation.batch=1"], r"evaluation\.batch=1 leaves some of 2 packed"),
        (
            ["training.micro_batches=1", "training.encode_ahead=1"],
            r"encode_ahead=1 encodes further .*micro_batches=1 has no further ones; use 2 or more",
        ),
    ],
)
def test_batches_that_the_layout_cannot_share_out_are_refused(
    file: Path, changes: list[str], said: str
) -> None:
    """Before anything starts, the batches of the evaluation too."""
    with pytest.raises(JobError, match=said):
        read_recipe(str(file), changes)


PIPELINED = [
    "layout.language=pp=4,dp=2",
    "layout.virtual_stages=2",
    "training.micro_batches=4",
    "training.encode_ahead=4",
    "evaluation.batch=32",
]


def test_stages_are_fields_of_a_recipe(file: Path) -> None:
    recipe = read_recipe(str(file), PIPELINED)
    assert recipe.language == Layout(pp=4, dp=2)
    assert (recipe.layout.virtual_stages, recipe.training.encode_ahead) == (2, 4)
    assert read_recipe(str(file), ["training.encode_ahead=1"]).training.encode_ahead == 1
    assert recipe.held_out_micro_batches == 4
    assert read_recipe(str(file)).held_out_micro_batches == 1
    assert read_recipe(as_file(file, recipe)) == recipe


BUBBLES = [
    "layout.language=pp=4,dp=2",
    "training.micro_batches=8",
    "training.encode_in_bubbles=3",
    "data.sequences=16",
    "evaluation.batch=64",
]


def test_bubbles_are_a_field_of_a_recipe(file: Path) -> None:
    recipe = read_recipe(str(file), BUBBLES)
    assert RunOptions.of(recipe, fresh=True).encode_in_bubbles == 3
    assert read_recipe(str(file)).training.encode_in_bubbles == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.encode_in_bubbles=5", "begins with 4 before it .*, so it can be at most 4$"),
        ("training.encode_in_bubbles=-1", "it must be at least 0"),
        ("training.encode_ahead=1", "say both when microbatches are encoded; set one of them"),
        ("layout.virtual_stages=2", "layout.virtual_stages=1, got pp=4 and 2"),
        ("layout.language=dp=8", "needs layout.language with pp=2 or more .*, got pp=1 and 1"),
    ],
)
def test_bubbles_that_cannot_be_filled_are_refused(file: Path, change: str, said: str) -> None:
    with pytest.raises(JobError, match=said):
        read_recipe(str(file), [*BUBBLES, change])


def as_file(beside: Path, recipe: Recipe) -> str:
    path = beside.with_name("again.yaml")
    path.write_text(as_yaml(recipe))
    return str(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.micro_batches=6", "interleaves groups of 4 microbatches, got .*=6; use a mult"),
        ("training.encode_ahead=2", "encode_ahead=2 needs layout.virtual_stages=1, got 2"),
        ("layout.language=pp=2,dp=4", "on pp=2 needs samples of one length, and these have sever"),
        ("model.torch_native=[language]", "takes no packed samples"),
        ("evaluation.batch=7", "=7 leaves some of 8 packed sequences empty; .* 4 microbatches and"),
    ],
)
def test_stages_that_cannot_run_are_refused(file: Path, change: str, said: str) -> None:
    with pytest.raises(JobError, match=said):
        read_recipe(str(file), [*PIPELINED, change])


def test_a_language_model_of_transformers_has_no_stages(file: Path) -> None:
    changes = ["layout.language=pp=2,dp=4", "model.torch_native=[language]", *ROWS]
    with pytest.raises(JobError, match="pp=2,dp=4 has pipeline stages, and model.torch_native na"):
        read_recipe(str(file), changes)


def test_lengths_of_token_files_may_be_known() -> None:
    def differ(*changes: str) -> bool:
        return read_recipe("text", changes).lengths_differ

    more = "{kind: tokens, settings: {path: a.bin, length: 512}}"
    assert not differ()
    assert differ("data.packed=true")
    assert differ(f"data.train=[{more}]")
    assert not differ(f"data.train=[{more}]", "data.held_out=[]")
    assert read_recipe("easy-vqa").lengths_differ


@pytest.mark.parametrize(("capacity", "fits"), [(47, False), (48, True)])
def test_sequences_have_room_for_a_sample_of_tokens(
    file: Path, capacity: int, fits: bool
) -> None:
    """Of 33 tokens with its last label, padded to 48; ``max_tokens`` is of conversations."""
    source = "[{kind: tokens, settings: {path: a.bin, length: 32}}]"
    changes = [f"data.train={source}", f"data.held_out={source}", f"data.capacity={capacity}"]
    if fits:
        assert read_recipe(str(file), changes).of_tokens
        return
    with pytest.raises(JobError, match=r"at least 48 \(a sample's 33 tokens, padded .* and 47"):
        read_recipe(str(file), changes)


def test_the_kinds_of_data_are_those_that_can_be_opened() -> None:
    assert sorted(DATA_KINDS) == sorted([*sources.KINDS, sources.TOKENS])


def test_batches_that_can_just_be_shared_out(file: Path) -> None:
    read_recipe(str(file), [*ROWS, "training.global_batch_size=4", "evaluation.batch=2"])
    read_recipe(str(file), [*PACKED, "training.global_batch_size=5", "evaluation.batch=3"])
    read_recipe(str(file), ["evaluation.batch=1", "data.held_out=[]"])


def test_files_that_hold_no_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"nothing\.yaml cannot be read: No such file"):
        read_recipe(str(tmp_path / "nothing.yaml"))
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(JobError, match=r"list\.yaml holds list, not the fields of a recipe"):
        read_recipe(str(tmp_path / "list.yaml"))
    (tmp_path / "part.yaml").write_text("name: x\n")
    with pytest.raises(JobError, match="part.yaml: .*required: data.train, training.steps"):
        read_recipe(str(tmp_path / "part.yaml"))
    with pytest.raises(JobError, match="no recipe is called 'easy-vqua'; did you mean easy-vqa"):
        read_recipe("easy-vqua")
    with pytest.raises(JobError, match="'llava'; did you mean llava-finetune or llava-pretrain"):
        read_recipe("llava")


def test_the_nearest_name_is_asked_for() -> None:
    near = did_you_mean("stesp", ["steps", "seed"], prefix="training.")
    assert near == "did you mean training.steps? "
    assert did_you_mean("stesp", ["seed", "steps"]) == "did you mean steps? "
    assert did_you_mean("stesp", ["lr"]) == ""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("{paht: a}", r"train\.0\.settings\.paht is not known; did you mean path\? chat takes"),
        ("{media: a}", r"data\.train\.0\.settings\.path is missing; chat data needs it"),
    ],
)
def test_settings_that_a_kind_of_data_has_not(file: Path, settings: str, said: str) -> None:
    """Said before a rank starts; nothing is opened for it."""
    change = f"data.train=[{{kind: chat, settings: {settings}}}]"
    with pytest.raises(JobError, match=said):
        check_data(read_recipe(str(file), [change]))


@pytest.mark.parametrize("name", [name for name, text in shipped().items() if "job:" not in text])
def test_recipes_that_ship_can_be_read(name: str) -> None:
    recipe = read_recipe(name)
    check_data(recipe)
    assert recipe.name == name
    assert f"{name}  " in describe_shipped()


@pytest.fixture(autouse=True)
def _everything_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extras that tests do not need, such as that of ``run.wandb``."""
    monkeypatch.setattr(errors, "_is_installed", lambda _name: True)


def typed(*argv: str) -> command.TrainCommand:
    return command._parse(["train", *argv], None)


def test_the_command_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = typed(str(file), "--set", "training.lr=2", "--fresh", "--dry-run", "--nodes", "4")
    assert given.recipe.training.lr == 2.0
    assert (given.fresh, given.dry_run, given.nodes) == (True, True, 4)
    assert (given.world_size, given.backend, given.out) == (8, "gloo", Path("runs/mine"))
    assert given.named == f"{file} --set training.lr=2"
    for flag, said in (("--list", "easy-vqa  "), ("--print", "name: mine")):
        with pytest.raises(SystemExit):
            typed(str(file), flag)
        assert said in capsys.readouterr().out
    with pytest.raises(JobError, match="needs a RECIPE: a name that --list shows"):
        typed()
    with pytest.raises(JobError, match=r"--nodes.*whole number from 1"):
        typed(str(file), "--nodes", "0")
    with pytest.raises(JobError, match="spans 8 ranks, but the job has 4; set layout.language"):
        command._parse(["train", str(file)], 4)


def test_steps_to_record(file: Path) -> None:
    assert typed(str(file)).profile is None
    given = typed(str(file), "--profile", "2-3", "--profile-ranks", "5,1")
    assert given.profile == Profile(2, 3, (1, 5))
    assert given.named == f"{file} --profile 2-3 --profile-ranks 1,5"
    assert typed(str(file), "--profile", "10").profile == Profile(10, 10, (0,))
    with pytest.raises(JobError, match=r"--profile 9-11: the run has training\.steps=10"):
        typed(str(file), "--profile", "9-11")
    with pytest.raises(JobError, match="--profile-ranks names rank 8, and the run has 8"):
        typed(str(file), "--profile", "1", "--profile-ranks", "8")
    with pytest.raises(JobError, match="--profile-ranks is of --profile STEPS; give both"):
        typed(str(file), "--profile-ranks", "all")


def test_wandb_is_looked_for_before_ranks_start(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "_is_installed", lambda name: name != "wandb")
    assert typed(str(file), "--set", "run.wandb=''").recipe.run.wandb == ""
    with pytest.raises(JobError, match="package is missing: wandb; .* leave run.wandb empty"):
        typed(str(file))


def test_tensorboard_is_looked_for_before_ranks_start(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "_is_installed", lambda name: name != "tensorboard")
    assert typed(str(file), "--set", "run.tensorboard=false").recipe.run.tensorboard is False
    with pytest.raises(JobError, match="package is missing: tensorboard; .* run.tensorboard=false"):
        typed(str(file))


def test_the_line_for_torchrun() -> None:
    assert plan.torchrun_line(8, 1, "x") == "torchrun --nproc-per-node 8 -m mimo_colocated train x"
    line = plan.torchrun_line(16, 4, "x --set a=1")
    assert line.startswith("torchrun --nproc-per-node 4 --nnodes 4 --rdzv-backend c10d")
    assert line.endswith("-m mimo_colocated train x --set a=1")


def test_the_state_of_the_code(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    (tmp_path / "old").write_text("")
    for line in ("init -q", "add old", "-c user.name=a -c user.email=b commit -q -m x"):
        subprocess.run(["git", "-C", str(tmp_path), *line.split()], check=True)
    (tmp_path / "new").write_text("")
    (tmp_path / "old").write_text("changed")
    found = git_state(tmp_path)
    assert found is not None
    assert len(found["commit"]) == 40
    assert found["changed"] == [" M old", "?? new"]


@pytest.mark.parametrize(
    "page, kinds", [("docs/training.md", ["llava", "chat"]), ("README.md", ["llava"])]
)
def test_the_recipe_of_the_docs_can_be_read(page: str, kinds: list[str], tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[4] / page).read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(text.partition("```yaml\n")[2].partition("```")[0])
    recipe = read_recipe(str(file))
    assert [part.kind for part in recipe.data.train] == kinds


ELSEWHERE = (
    ("model", "make"),  # instead of a folder: tests/functional/test_recipes.py
    ("model", "settings"),
    ("model", "from_run"),  # test_fine_tuning.py
    ("layout", "virtual_stages"),  # PIPELINED
    ("training", "encode_ahead"),
    ("training", "encode_in_bubbles"),  # BUBBLES
)
def test_links_are_named_by_a_preset_or_a_file(file: Path, tmp_path: Path) -> None:
    """In place of what the recipe says; ``--set`` changes them further."""
    given = typed(str(file), "--lossy", "default", "--set", "lossy.seed=9")
    assert given.recipe.lossy == LossyPart([LinkPart("default")], seed=9)
    assert given.named == f"{file} --set lossy.seed=9 --lossy default"
    links = tmp_path / "link.yaml"
    links.write_text(yaml.safe_dump(WHOLE["lossy"]))
    assert read_recipe("text", lossy=str(links)).lossy == read_recipe(str(file)).lossy
    assert read_recipe("text").lossy == LossyPart()
    for text, said in (("[1]", "link.yaml has no rules; docs"), ("{", "link.yaml is no YAML")):
        links.write_text(text)
        with pytest.raises(JobError, match=said):
            typed(str(file), "--lossy", str(links))
    with pytest.raises(JobError, match="loss='defult' is no preset; did you mean default"):
        typed(str(file), "--lossy", "defult")


def test_every_field_of_a_recipe_has_a_test() -> None:
    """The recipe of these tests sets every field, none to what it is without."""
    types = typing.get_type_hints(Recipe)
    for name, kind in types.items():
        for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
            if (name, field.name) in ELSEWHERE:
                continue
            value = WHOLE[name][field.name]
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            assert value != default, f"{name}.{field.name}"
    (rule,) = WHOLE["lossy"]["rules"]
    without = dataclasses.asdict(LinkPart("default"))
    assert rule.keys() == without.keys()
    assert not [name for name, value in rule.items() if value == without[name]]


@pytest.mark.parametrize(
    "steps, given, warmup",
    [(1, None, 0), (3, None, 0), (50, None, 5), (1500, None, 20), (50, 30, 30), (1500, 0, 0)],
)
def test_a_short_trial_sets_no_warmup(steps: int, given: int | None, warmup: int) -> None:
    """The default fits the steps; what is set stays as it is."""
    part = TrainingPart(steps=steps, global_batch_size=1, warmup_steps=given)
    assert part.warmup == warmup
