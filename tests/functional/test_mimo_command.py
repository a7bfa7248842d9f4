# SPDX-License-Identifier: Apache-2.0
"""``mimo``: import, export, check and doctor, as a user types them."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from examples.mimo.digits.options import parse_options
from megatron.core.models.mimo.huggingface import logits_check
from megatron.core.models.mimo.huggingface.logits_check import Verdict
from mimo_colocated.cli import checking, doctor
from mimo_colocated.cli import models as cli_models
from mimo_colocated.cli.main import _parse, main
from mimo_colocated.cli.options import ALONE, COMMANDS, parser_of, read
from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.layouts import Layout
from mimo_colocated.launch.lora import Lora
from mimo_colocated.train import command as train
from mimo_colocated.train import joining
from tests.faults.starts import LAUNCH_VARIABLES
from tests.harness import programs
from tests.unit_tests.mimo.huggingface import harness, models

pytestmark = pytest.mark.once

TIMEOUT_S = 500
# Kills the only rank when the first file of weights is closed.
KILLED = """
import os, signal, sys
import megatron.core.models.mimo.huggingface.export
from megatron.core.models.mimo.huggingface.safetensors_file import SafetensorsFile
from mimo_colocated.cli.main import main
whole = SafetensorsFile.close
def close(self):
    whole(self)
    os.kill(os.getpid(), signal.SIGKILL)
SafetensorsFile.close = close
sys.exit(main(sys.argv[1:]))
"""


def mimo(
    *arguments: object, program: tuple[str, ...] = ("-m", "mimo_colocated")
) -> SimpleNamespace:
    """Run the command; what it printed, its error, its exit code."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES}
    given = [*program, *map(str, arguments)]
    done: subprocess.CompletedProcess[str] = programs.run(
        given, Path.cwd(), environment, timeout=TIMEOUT_S
    )
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def save(model: torch.nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    harness.randomise(model, seed=4).to(dtype).save_pretrained(folder, max_shard_size=20_000)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bfloat16, in several files."""
    where = tmp_path_factory.mktemp("llama") / "model"
    return save(models.DENSE["llama"](), where, torch.bfloat16)


@pytest.fixture(scope="module")
def imported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the checkpoint of two ranks."""
    run = tmp_path_factory.mktemp("run")
    done = mimo("import", folder, run / "checkpoints", "--language", "tp=2")
    assert done.code == 0, done.err
    assert "step_00000000; a run loads it with CheckpointStore(" in done.out
    return run


def test_a_folder_goes_through_a_checkpoint_and_comes_back(
    folder: Path, imported: Path, tmp_path: Path
) -> None:
    manifest = json.loads((imported / "checkpoints" / "step_00000000" / "mimo.json").read_text())
    assert manifest["extra"]["huggingface"]["source"] == str(folder)
    assert manifest["extra"]["huggingface"]["torch_native"] == []
    assert manifest["layouts"] == {"language": {"tp": 2, "cp": 1, "pp": 1, "dp": 1}}
    killed = mimo("export", imported, tmp_path / "out", program=("-c", KILLED))
    assert (killed.code, "was killed by SIGKILL" in killed.err) == (1, True)
    # Nothing that anybody takes for a model, and no obstacle.
    assert [path.name for path in tmp_path.iterdir()] == [".out.exporting"]
    assert not (tmp_path / ".out.exporting" / "config.json").exists()
    done = mimo("export", imported, tmp_path / "out")
    assert done.code == 0, done.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(contents(folder)) > 5
    assert contents(folder) == contents(tmp_path / "out")


def test_logits_are_checked_with_images_in_any_layout(tmp_path: Path) -> None:
    vision = transformers.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=12,
        patch_size=4,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**models.SIZES),
        image_token_index=98,
        vision_feature_layer=-2,
    )
    made = save(transformers.LlavaForConditionalGeneration(config), tmp_path / "llava")
    layouts = ("--vision", "tp=1,dp=2", "--language", "tp=2")
    done = mimo("check", made, *layouts)
    assert done.code == 0, done.err
    found = re.findall(
        r"^(text|one each|several each|some without) +(\S+) +worst: ", done.out, re.M
    )
    assert [case for case, _ in found] == ["text", "one each", "several each", "some without"]
    assert all(0 < float(error) < 1e-5 for _, error in found)
    assert "weights        all as read" in done.out
    control = mimo("check", made, *layouts, "--control")
    assert control.code == 1
    assert control.out.count("ABOVE THE BOUND") == 4
    assert re.search(
        r"error: the logits of '.+' differ from transformers' by \S+ of the largest logit, more "
        r"than 1e-05; weight language_model.model.norm.weight is not the folder's",
        control.err,
    )


@pytest.mark.once
@pytest.mark.parametrize("dtype", checking.BOUNDS)
def test_without_a_bound_it_is_that_of_the_dtype(
    dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    bound = checking.BOUNDS[dtype]
    verdicts = [Verdict("text", error, (0, 0, 0)) for error in (bound, 1.01 * bound)]
    made = SimpleNamespace(
        source="drawn", cases=lambda: iter(verdicts), worst_weight=lambda: ("w", 0.0)
    )
    monkeypatch.setattr(logits_check, "LogitsCheck", lambda built: made)
    monkeypatch.setattr(checking.models, "build", lambda folder, options, dtype: None)
    monkeypatch.setattr(checking.models, "say", print)
    options = read("check", ["folder", "--dtype", dtype])
    with pytest.raises(JobError, match=f"more than {bound:g}$"):
        checking.work(options)
    said = capsys.readouterr().out
    assert f"bound {bound:g} of the largest logit" in said
    assert re.findall("(?:ok|ABOVE THE BOUND)$", said, re.M) == ["ok", "ABOVE THE BOUND"]
    (told,) = re.findall(r"largest logit; without: (.*?) --", help_of("check"))
    assert set(map(float, re.findall(r"\d+e-\d+", told))) == set(checking.BOUNDS.values())


def help_of(command: str) -> str:
    parser = train.parser() if command == "train" else parser_of(command)
    return " ".join(parser.format_help().split())


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The error of a command line that starts no rank."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def with_config(folder: Path, target: Path, **values: object) -> Path:
    """A folder with other values in its configuration."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | values))
    return target


def test_what_cannot_be_is_said_before_a_rank_starts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_anything: object) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr("mimo_colocated.launch.launcher._start_and_wait", start)
    out = tmp_path / "out"
    words = refused(capsys, "import", tmp_path / "nothing", out)
    assert "nothing does not exist; give a folder of this machine, as `hf download` makes" in words
    words = refused(capsys, "import", folder, out, "--language", "tp=8")
    assert "language tp=8 does not divide its 4 key/value heads; tp can be [1, 2, 4]" in words
    words = refused(capsys, "check", folder, "--vision", "tp=1")
    assert "--vision is given, but the model in" in words
    other = with_config(folder, tmp_path / "other", model_type="gemma2")
    assert "model_type 'gemma2' is not known; known are" in refused(capsys, "import", other, out)
    unknown = with_config(folder, tmp_path / "unknown", model_type="frob")
    words = refused(capsys, "import", unknown, out)
    assert "cannot read" in words
    assert "`frob`" in words
    words = refused(capsys, "import", folder, folder)
    assert "model exists and is not empty; give another folder" in words
    words = refused(capsys, "import", folder, folder / "config.json" / "out")
    assert "config.json/out cannot be made: " in words
    assert "config.json is not a folder; give another place" in words
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, _mode: Path(path) != tmp_path)
        words = refused(capsys, "import", folder, out / "deeper")
    assert f"out/deeper cannot be made: you may not write in {tmp_path}; give another" in words
    words = refused(capsys, "export", tmp_path / "nothing", out)
    assert "nothing is no checkpoint and no run" in words
    words = refused(capsys, "check", folder, "--control", "--dtype", "bfloat16")
    assert "a change of 1e-3 is within its rounding; use --dtype float32" in words
    for name, sentence in (
        ("num_hidden_layers", "made of ['model.layers.2.input_layernorm.weight']"),
        ("intermediate_size", "'model.layers.0.mlp.gate_proj.weight' has shape [48, 32]"),
    ):
        more = with_config(folder, tmp_path / name, **{name: 3 if name[0] == "n" else 40})
        for command in ("import", "check"):
            given = (more, tmp_path / "out") if command == "import" else (more,)
            assert sentence in refused(capsys, command, *given)
    fewer = with_config(folder, tmp_path / "fewer", num_hidden_layers=1)
    assert "has tensors that the model has no place for" in refused(capsys, "check", fewer)
    (other / sorted(p.name for p in other.glob("*.safetensors"))[0]).unlink()
    assert "which are not there; download the folder again" in refused(capsys, "check", other)


def test_tracebacks_of_every_start_have_a_folder_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for start in ("launch-a", "launch-b"):
        monkeypatch.setenv("MIMO_LAUNCH_REPORTS", f"/somewhere/{start}")
        found.append(read("check", ["folder"]).out.name)
    assert found == ["mimo-check-launch-a", "mimo-check-launch-b"]


def test_an_export_is_refused_before_a_rank_starts(
    folder: Path, imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = refused(capsys, "export", imported, folder)
    assert "are the same or within one another; give a folder beside it" in words
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "config.json").touch()
    words = refused(capsys, "export", imported, taken)
    assert "taken exists and is not empty; give another folder, or overwrite=True" in words
    step = imported / "checkpoints" / "step_00000000"
    run = tmp_path / "run"
    (run / step.name).mkdir(parents=True)
    entries = json.loads((step / "mimo.json").read_text())
    for extra, said in (
        ({}, "does not say which Hugging Face folder its model came from; name it with --source"),
        ({"huggingface": {"source": "/gone"}}, "the model came from /gone, which is not there"),
        (
            {"huggingface": {"source": str(folder), "torch_native": ["language"]}},
            "run is torch-native, which has no pipeline stages, and --language gives pp=2; give",
        ),
    ):
        changed = {**entries, "extra": extra, "digest": None}
        (run / step.name / "mimo.json").write_text(json.dumps(changed))
        words = refused(
            capsys, "export", run / step.name, tmp_path / "out", "--language", "tp=1,pp=2"
        )
        assert said in words


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import a", "the following arguments are required: target"),
        ("import a b --language tp=x", "tp must be a whole number from 1"),
        ("import a b --timeout 0", "--timeout: must be a whole number from 1 to 2147483647"),
        ("import a b --frob", "unrecognized arguments: --frob"),
        ("check a --bound -1", "must be a number above 0, got '-1'"),
        ("frob", "'frob' is no command; the commands are import, export, check, calibrate"),
        ("doctor --frob", "unrecognized arguments: --frob"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    line: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    assert said in refused(capsys, *line.split())


@pytest.mark.parametrize("command", [*COMMANDS, "train", "digits"])
@pytest.mark.parametrize("more", [-1, 1], ids=["too few", "too many"])
def test_ranks_that_the_layouts_do_not_span_are_refused(command: str, more: int) -> None:
    """As torchrun and Slurm start them, of whatever number."""
    two = "layout.language=dp=2", "layout.encoders.images=dp=2"
    line = {
        **dict.fromkeys(COMMANDS, ["a", "b", "--language", "tp=2"]),
        **dict.fromkeys(("check", "eval"), ["a", "--language", "tp=2"]),
        "calibrate": ["a.json", "--ranks", "2"],
        "train": ["easy-vqa", *(word for each in two for word in ("--set", each))],
        "digits": ["--vision", "dp=2", "--language", "dp=2"],
    }[command]

    def parsed(world: int | None) -> Any:
        if command == "digits":
            return parse_options(line, world)
        return (train._parse if command == "train" else _parse)([command, *line], world)

    assert parsed(2).world_size == parsed(None).world_size == 2
    said = rf"(2 ranks|--ranks is 2), but the job has {2 + more}\b"
    with pytest.raises(JobError, match=said):
        parsed(2 + more)


@pytest.mark.parametrize("command", [*COMMANDS, *ALONE, "train"])
def test_help_names_types_in_words(command: str) -> None:
    text = help_of(command)
    assert not re.search(r"<function|<locals>| at 0x|Number\(", text)
    if command == "report":  # it takes no number
        return
    whole = {"draw": "samples", "plan": "gpus", "train": "nodes"}.get(command, "timeout")
    assert re.search(rf"--{whole} \S+ [^()]*\(type: whole number from 1, default: \d+\)", text)


def test_options_come_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("language: tp=2,dp=2\ntimeout: 7\noverwrite: true\n")
    options = read("export", ["run", "out", "--config", str(file), "--timeout", "9"])
    assert (options.language, options.world_size) == (Layout(tp=2, dp=2), 4)
    assert (options.timeout, options.more) == (9, {"overwrite": True})
    assert (options.checkpoint, options.target, options.source) == (Path("run"), Path("out"), None)


def test_the_doctor_needs_no_extras_and_tells_each_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor", "--folder", str(tmp_path)]) == 0
    found = capsys.readouterr().out
    assert f"ok    torch               {version('torch')}\n" in found
    assert re.search(r"^ok    mimo modules +\S+/mimo$", found, re.M)
    assert re.search(rf"^ok    folder +{tmp_path}: .* free; writes, locks, renames$", found, re.M)
    assert list(tmp_path.iterdir()) == []
    there = doctor._version
    missing = {"jsonargparse": None, "megatron-core": "0.17.0"}
    monkeypatch.setattr(doctor, "_version", lambda name: missing.get(name, there(name)))
    assert main(["doctor", "--folder", str(tmp_path / "no")]) == 1
    found = capsys.readouterr().out
    assert re.search(r"note  jsonargparse .*\n +-> pip install '.*\[cli\]'", found)
    assert re.search(r"BAD   megatron-core +0.17.0\n +-> install a supported one: 0.16.1", found)
    assert re.search(r"BAD   folder .*/no is not there\n +-> make it: mkdir -p", found)


def test_the_doctor_tells_what_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each check alone: one that raises is a line, and no other one is lost."""

    def cures(check: Any, *given: Any) -> list[tuple[str, str, str]]:
        lines = doctor._checked(lambda: check(*given))
        return [(line.found, line.state, line.cure) for line in lines if line.state != doctor.OK]

    def broken() -> Any:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(broken, "__name__", "torch_lines")
    assert doctor._checked(broken) == [
        doctor.Line("torch", "RuntimeError: two lines", doctor.BAD, "see the error")
    ]
    there = doctor._version
    for name, check in (("torch", doctor.torch_lines), ("megatron-core", doctor.megatron_lines)):
        monkeypatch.setattr(doctor, "_version", lambda each, of=name: None if each == of else "1")
        ((found, state, cure),) = cures(check)
        assert (found, state) == ("not installed", doctor.BAD)
        assert cure.startswith(("pip install", "install a supported one"))
    monkeypatch.setattr(doctor, "_version", there)
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: True)
    assert [found for found, *_ in cures(doctor.torch_lines)] == (
        [] if torch.cuda.is_available() else ["the driver is there, but torch sees no GPU"]
    )
    monkeypatch.setattr(doctor, "_SHARED_MEMORY", tmp_path / "shm")
    assert cures(doctor.memory_lines) == [
        (f"no {tmp_path / 'shm'}", doctor.BAD, "mount a tmpfs there")
    ]


@pytest.mark.parametrize("there", ["nothing", "broken", "no GPU", "old GPU", "GPU"])
def test_the_doctor_on_transformer_engine(there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda _name: None if there == "nothing" else "2.9")
    broken = None if there == "broken" else SimpleNamespace()
    monkeypatch.setitem(sys.modules, "transformer_engine", broken)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there in ("old GPU", "GPU"))
    capability = (8, 0) if there == "old GPU" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    (line,) = doctor.te_lines()
    assert (line.state, line.found) == {
        "nothing": (doctor.NOTE, "not installed: Megatron's local layers are used"),
        "broken": (doctor.BAD, "2.9 cannot be imported: ModuleNotFoundError"),
        "no GPU": (doctor.NOTE, "2.9; its layers need a GPU"),
        "old GPU": (
            doctor.OK, "2.9: layers, fused attention, no fp8: it needs compute capability 8.9"
        ),
        "GPU": (doctor.OK, "2.9: layers, fused attention, fp8 too"),
    }[there]


def test_the_doctor_tries_what_a_save_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_given: Any, **_how: Any) -> None:
        raise PermissionError(13, "Permission denied")

    def unseen(_self: Path) -> bool:
        return _self == tmp_path

    cases: list[tuple[Any, str, Any, str]] = [
        (fcntl, "flock", refuse, "files cannot be locked"),
        (Path, "is_dir", unseen, "a renamed folder is not seen"),
        (doctor.tempfile, "mkdtemp", refuse, "cannot be written: Permission denied"),
    ]
    for where, name, what, said in cases:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, what)
            (line,) = doctor.folder_lines(str(tmp_path))
        assert (line.state, said in line.found) == (doctor.BAD, True)
        assert list(tmp_path.iterdir()) == []


def test_without_a_command_the_usage_is_shown(capsys: pytest.CaptureFixture) -> None:
    for argv, code in (([], 2), (["--help"], 0), (["-h"], 0)):
        assert main(argv) == code
        said = capsys.readouterr().out
        assert all(command in said for command in (*COMMANDS, *ALONE, "train", "doctor"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["calibrate", "out.json", "--ranks", "2"], "--ranks is 2, but the job has 4"),
        (["check", "folder", "--language", "tp=2"], "--language tp=2,dp=1 spans 2 ranks, but the"),
    ],
)
def test_a_command_under_torchrun_with_other_ranks_is_refused(argv: list[str], said: str) -> None:
    with pytest.raises(JobError, match=said):
        _parse(argv, 4)
    assert _parse(argv, 2).world_size == 2


def _die(*_given: Any) -> None:
    os._exit(3)


def test_a_process_that_ends_without_an_answer_is_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that runs out of memory."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # forked, so that it dies here too
    monkeypatch.setattr(cli_models, "_count_trained", _die)
    with pytest.raises(JobError, match=rf"counting what of {folder} trains ended without an answ"):
        cli_models.trained_of(folder, [], Lora(), [])
    monkeypatch.setattr(joining, "_join", _die)
    with pytest.raises(JobError, match="process that joins the folders ended with exit code 3"):
        joining.join({}, tmp_path)


def _fail(*_given: Any) -> None:
    raise RuntimeError("two\nlines")


def test_whatever_keeps_folders_from_being_joined_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(joining, "_join", _fail)
    with pytest.raises(JobError, match="the folders cannot be joined: two lines"):
        joining.join({}, tmp_path)


def test_without_the_library_for_options_the_doctor_works_and_others_say_what_to_install() -> None:
    program = """
import sys
sys.modules["jsonargparse"] = None  # as if it were not installed
from mimo_colocated.cli.main import main
assert main(["doctor"]) == 0
sys.exit(main(["check", "folder"]))
"""
    done = mimo(program=("-c", program))
    assert "ok    torch" in done.out
    assert done.code == 2
    assert "the package is missing: jsonargparse; install what `mimo` needs with" in done.err


def test_an_import_error_of_the_parser_is_not_a_traceback() -> None:
    with pytest.raises(JobError, match="File does not exist"):
        read("check", ["a", "--config", "/nowhere/x.yaml"])
