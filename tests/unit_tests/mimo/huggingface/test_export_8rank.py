# SPDX-License-Identifier: Apache-2.0
"""From any layout back to a folder: every byte of every tensor, and whatever else lies in it."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.mimo.checkpoint.store import CheckpointStore
from megatron.core.models.mimo.huggingface.build import BuildOptions, from_folder
from megatron.core.models.mimo.huggingface.export import ExportError, to_folder
from megatron.core.models.mimo.huggingface.safetensors_file import SafetensorsFile
from mimo_colocated.cli.importing import NoOptimizer
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import (
    harness,
    llava_models,
    models,
    qwen_vl_models,
    sounds,
)
from tests.unit_tests.mimo.tiny_modules import on_all_ranks

pytestmark = pytest.mark.ranks(8)

LAYOUTS = {
    "tp4-dp2": Layout(tp=4, dp=2),
    "pp2-tp2-cp2": Layout(tp=2, pp=2, cp=2),
    "tp2-ep2": Layout(tp=2, cp=2, dp=2, ep=2, etp=2),
    "dp8-ep4": Layout(dp=8, ep=4, etp=1),
}
ROWS = [("llama3", "tp4-dp2"), ("qwen2-tied", "pp2-tp2-cp2"), ("gpt2", "pp2-tp2-cp2")]
ROWS += [("qwen3_moe", "tp2-ep2"), ("mixtral", "dp8-ep4")]
EXTRAS = {"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}", "more/notes.txt": "n"}


def save(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random model in several files, beside them what a real folder has; all ranks call it."""
    if dist.get_rank() == 0:
        model = harness.randomise({**models.DENSE, **models.SPARSE}[name](), seed=5)
        model.to(dtype).save_pretrained(folder, max_shard_size=20_000)
        for file, text in EXTRAS.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(text)
    dist.barrier()
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(("family", "layout"), ROWS)
def test_a_folder_comes_back_byte_for_byte(family: str, layout: str, shared_tmp_path: Path) -> None:
    source = save(family, shared_tmp_path / "source")
    options = BuildOptions(dtype=torch.bfloat16, sequence_parallel=layout == "tp2-ep2")
    built = from_folder(source, {"language": LAYOUTS[layout]}, options)
    done: list[int] = []
    to_folder(built, shared_tmp_path / "out", tick=done.append)
    built.destroy()
    before, after = everything(source), everything(shared_tmp_path / "out")
    index = "model.safetensors.index.json"
    assert len(before) > 6
    assert json.loads(before.pop(index)) == json.loads(after.pop(index))
    assert sum(done) == sum(t.numel() * 2 for t in harness.whole_folder(source).values())
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []


_LAYER, _THEIRS, _H = "decoder.layers.0.", "model.layers.0.", "transformer.h.0."
_LLAMA = {
    "decoder.final_layernorm.weight": "model.norm.weight",
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    _LAYER + "self_attention.linear_qkv.weight": _THEIRS + "self_attn.q_proj.weight",
    _LAYER + "self_attention.linear_proj.weight": _THEIRS + "self_attn.o_proj.weight",
}
CHANGES = {
    "llama": {
        **_LLAMA,
        _LAYER + "mlp.linear_fc1.weight": _THEIRS + "mlp.gate_proj.weight",
        _LAYER + "mlp.linear_fc2.weight": _THEIRS + "mlp.down_proj.weight",
    },
    "qwen3_moe": {
        **_LLAMA,
        _LAYER + "mlp.router.weight": _THEIRS + "mlp.gate.weight",
        _LAYER + "mlp.experts.local_experts.3.linear_fc1.weight": _THEIRS
        + "mlp.experts.3.gate_proj.weight",
        _LAYER + "mlp.experts.local_experts.1.linear_fc2.weight": _THEIRS
        + "mlp.experts.1.down_proj.weight",
    },
    "gpt2": {
        "decoder.final_layernorm.bias": "transformer.ln_f.bias",
        "embedding.word_embeddings.weight": "transformer.wte.weight",
        _LAYER + "self_attention.linear_qkv.weight": _H + "attn.c_attn.weight",
        _LAYER + "self_attention.linear_proj.weight": _H + "attn.c_proj.weight",
        _LAYER + "mlp.linear_fc1.weight": _H + "mlp.c_fc.weight",
        _LAYER + "mlp.linear_fc1.bias": _H + "mlp.c_fc.bias",
    },
}
"""Our weights of every kind of cut -> what a change of their first element changes."""


def changed(built, family: str) -> set[str]:
    """Names of the tensors of which this has changed one element by 1e-3."""
    for ours in CHANGES[family]:
        flat = "norm" in ours or ours.endswith("bias")
        assert harness.change_one(built, ours, (0,) if flat else (0, 0), 1e-3)
    return set(CHANGES[family].values())


@pytest.mark.parametrize(("family", "layout"), [("gpt2", "pp2-tp2-cp2"), ("qwen3_moe", "tp2-ep2")])
def test_a_weight_that_is_off_by_a_thousandth_does_not_come_back(
    family: str, layout: str, shared_tmp_path: Path
) -> None:
    """The control of the test above, for each kind of cut."""
    source = save(family, shared_tmp_path / "source", torch.float32)
    options = BuildOptions(sequence_parallel=layout == "tp2-ep2")
    built = from_folder(source, {"language": LAYOUTS[layout]}, options)
    expected = changed(built, family)
    to_folder(built, shared_tmp_path / "out")
    built.destroy()
    before, after = (harness.whole_folder(shared_tmp_path / name) for name in ("source", "out"))
    assert set(harness.differing(before, after)) == expected


FAN_IN = {"encoder": Layout(tp=2, dp=4), "language": Layout(tp=2, cp=2, dp=2)}
STAGES = {"encoder": Layout(tp=4, dp=2), "language": Layout(tp=2, pp=2, dp=2)}


@pytest.mark.parametrize(
    ("make", "modality", "layouts"),
    [
        (lambda: llava_models.llava("clip-llama"), "images", FAN_IN),
        (lambda: llava_models.llava("siglip-qwen2"), "images", STAGES),
        (sounds.qwen2_audio, "audio", STAGES),
        (qwen_vl_models.qwen2_5_vl, "images", FAN_IN),
    ],
    ids=["clip", "tied siglip", "qwen2_audio", "qwen2_5_vl"],
)
def test_a_whole_model_comes_back_byte_for_byte(
    make: Callable[[], torch.nn.Module],
    modality: str,
    layouts: dict[str, Layout],
    shared_tmp_path: Path,
) -> None:
    source = shared_tmp_path / "source"
    if dist.get_rank() == 0:
        make().save_pretrained(source, max_shard_size=50_000)
    dist.barrier()
    chosen = {modality: layouts["encoder"], "language": layouts["language"]}
    built = from_folder(source, chosen)
    to_folder(built, shared_tmp_path / "out")
    built.destroy()
    before, after = everything(source), everything(shared_tmp_path / "out")
    index = "model.safetensors.index.json"
    assert json.loads(before.pop(index)) == json.loads(after.pop(index))
    assert [name for name in before if before[name] != after[name]] == []


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model whose folder stores the output layer once more, and a buffer."""
    folder = on_all_ranks(tmp_path_factory.mktemp("source"))[0] / "model"
    save("qwen2-tied", folder)
    if dist.get_rank() == 0:
        add_tensors(folder)
    dist.barrier()
    return folder


def add_tensors(folder: Path) -> None:
    """A tied output layer and rotary frequencies, as older folders store them."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    embedding = harness.whole_folder(folder)["model.embed_tokens.weight"]
    frequencies = torch.tensor([0.5, 0.25], device="cpu")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    added = {"lm_head.weight": embedding.clone(), name: frequencies}
    save_file(added, folder / "more.safetensors", {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(added, "more.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def built(source: Path):
    made = from_folder(source, {"language": Layout(tp=2, cp=2, dp=2)}, BuildOptions())
    yield made
    made.destroy()


def told(error: pytest.ExceptionInfo) -> str:
    """The error's words, the same on all ranks."""
    words = set(on_all_ranks(str(error.value)))
    assert len(words) == 1
    return words.pop()


def test_weights_that_changed_are_written_and_a_repeated_tensor_with_them(
    built, source: Path, shared_tmp_path: Path
) -> None:
    held = "embedding.word_embeddings.weight"
    assert harness.change_one(built, held, (0, 0), 1.0)
    to_folder(built, shared_tmp_path / "out", dtype=torch.float32, max_file_bytes=20_000)
    assert harness.change_one(built, held, (0, 0), -1.0)
    before = harness.whole_folder(source)
    after = harness.whole_folder(shared_tmp_path / "out")
    changed = [name for name in before if not torch.equal(before[name].float(), after[name])]
    assert changed == ["model.embed_tokens.weight", "lm_head.weight"]
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    difference = after["lm_head.weight"] - before["lm_head.weight"].float()
    assert difference.nonzero().tolist() == [[0, 0]]
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    files = sorted(path.name for path in (shared_tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    assert json.loads((shared_tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_transformers_reads_it(built, source: Path, shared_tmp_path: Path) -> None:
    to_folder(built, shared_tmp_path / "out")
    theirs = [
        transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (source, shared_tmp_path / "out")
    ]
    assert theirs[0].keys() == theirs[1].keys()
    assert all(torch.equal(theirs[0][name], theirs[1][name]) for name in theirs[0])


def test_a_folder_that_is_taken_is_refused_and_stays(built, shared_tmp_path: Path) -> None:
    taken = shared_tmp_path / "taken"
    if dist.get_rank() == 0:
        taken.mkdir()
        (taken / "diary.txt").write_text("dear diary")
    dist.barrier()
    with pytest.raises(ExportError) as refused:
        to_folder(built, taken)
    assert "taken exists and is not empty; give another folder, or overwrite=True" in told(refused)
    with pytest.raises(ExportError) as refused:
        to_folder(built, taken, overwrite=True)
    assert "taken holds no model (it has no config.json), so it is not replaced" in told(refused)
    assert everything(shared_tmp_path) == {"taken/diary.txt": b"dear diary"}
    dist.barrier()


def test_a_model_is_replaced_when_the_new_one_is_whole(
    built, source: Path, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shared_tmp_path / "out"
    if dist.get_rank() == 0:
        out.mkdir()
        (out / "config.json").write_text("{}")
        (out / "model-00009-of-00009.safetensors").write_text("old")
        (out / "diary.txt").write_text("dear diary")
    dist.barrier()
    with pytest.raises(ExportError, match=r"does not replace: \['diary.txt'\]; move it elsewhere"):
        to_folder(built, out, overwrite=True)
    dist.barrier()
    if dist.get_rank() == 0:
        (out / "diary.txt").unlink()
    dist.barrier()
    with monkeypatch.context() as patch:
        break_files(patch, rank=1)
        with pytest.raises(ExportError):
            to_folder(built, out, overwrite=True)
    dist.barrier()
    old = {"out/config.json", "out/model-00009-of-00009.safetensors"}
    assert everything(shared_tmp_path).keys() == old
    dist.barrier()
    to_folder(built, out, overwrite=True)
    assert everything(shared_tmp_path).keys() == {f"out/{name}" for name in everything(source)}


def break_files(patch: pytest.MonkeyPatch, rank: int) -> None:
    """The disk of one rank is full after a few bytes."""
    whole, full = SafetensorsFile.write, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    def write(self: SafetensorsFile, tensor: torch.Tensor) -> None:
        if dist.get_rank() == rank and len(self._expected) == 1:
            raise full
        whole(self, tensor)

    patch.setattr(SafetensorsFile, "write", write)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_one_sentence_and_nothing_is_left(
    rank: int, built, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_files(monkeypatch, rank)
    with pytest.raises(ExportError) as refused:
        to_folder(built, shared_tmp_path / "out")
    expected = rf"rank {rank} could not write \S+out: the disk is full \(.+\); make room there"
    assert re.match(expected, told(refused))
    assert list(shared_tmp_path.iterdir()) == []


def test_a_source_that_is_gone_on_one_rank_is_refused_on_all(
    built, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dist.get_rank() == 5:
        monkeypatch.setattr(built, "source", shared_tmp_path / "gone")
    with pytest.raises(ExportError) as refused:
        to_folder(built, shared_tmp_path / "out")
    words = told(refused)
    assert "rank 5 could not open the folder that the model came from: " in words
    assert "gone does not exist; give a folder of this machine" in words


def test_folders_that_are_not_one_are_refused(
    built, shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.core.models.mimo.checkpoint.shared_folder.PATIENCE_S", 0.2)
    mine = shared_tmp_path / ("a" if dist.get_rank() < 6 else "b")
    with pytest.raises(ExportError) as refused:
        to_folder(built, mine / "out")
    assert "ranks 6 and 7 cannot see the folder" in told(refused)
    assert "all ranks write a model's files into one folder" in told(refused)


def trained(built, task: harness.Task) -> harness.HarnessTrainer:
    """A trainer after three steps."""
    trainer = harness.trainer_of(built, task)
    for step in range(3):
        trainer.step(task, step)
    return trainer


def test_two_layouts_export_the_same_weights_after_three_steps(shared_tmp_path: Path) -> None:
    model = harness.randomise(models.DENSE["llama"](), seed=5)
    task = harness.text_task(model, models.VOCABULARY)
    source = save("llama", shared_tmp_path / "source", torch.float32)
    found = []
    for layout in (Layout(tp=2, cp=2, dp=2), Layout(tp=4, dp=2)):
        built = harness.built_case(source, harness.Case(layout))
        trainer = trained(built, task)
        to_folder(built, shared_tmp_path / str(layout))
        store = CheckpointStore(shared_tmp_path / f"{layout}-run", built.layouts())
        store.save(3, built.model, trainer.optimizer)
        off = changed(built, "llama")
        to_folder(built, shared_tmp_path / f"{layout}-off")
        built.destroy()
        found.append(harness.whole_folder(shared_tmp_path / str(layout)))
    before = harness.whole_folder(source)
    assert harness.differing(found[0], found[1], 1e-5) == []
    assert len(harness.differing(before, found[0])) == len(before)
    # The control: one element of a weight of each kind, changed by 1e-3 in one of the layouts.
    control = harness.whole_folder(shared_tmp_path / f"{layout}-off")
    assert set(harness.differing(found[0], control, 1e-5)) == off
    # Straight from the checkpoint, in a third layout: every byte.
    other = from_folder(source, {"language": Layout(pp=2, dp=4)}, load_weights=False)
    CheckpointStore(store.root, other.layouts()).load(3, other.model)
    to_folder(other, shared_tmp_path / "third")
    other.destroy()
    third = harness.whole_folder(shared_tmp_path / "third")
    assert all(torch.equal(third[name], found[1][name]) for name in third)


def test_a_run_starts_from_an_imported_checkpoint(source: Path, shared_tmp_path: Path) -> None:
    frozen = BuildOptions(dtype=torch.bfloat16, freeze=lambda model: model.requires_grad_(False))
    imported = from_folder(source, {"language": Layout(tp=2, dp=4)}, frozen)
    store = CheckpointStore(shared_tmp_path / "run", imported.layouts())
    store.save(0, imported.model, NoOptimizer(), {})
    imported.destroy()
    overlapping = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        check_for_nan_in_grad=False,
    )
    settings = BuildOptions(dtype=torch.bfloat16, seed=77, ddp=overlapping)
    layouts = {"language": Layout(tp=2, cp=2, dp=2)}
    built = from_folder(source, layouts, settings, load_weights=False)
    task = harness.text_task(torch.nn.Module(), models.VOCABULARY)
    options = harness.TrainOptions(steps=10, global_batch_size=4, warmup_steps=0)
    trainer = harness.HarnessTrainer(built, options, distributed_optimizer=True)
    store = CheckpointStore(shared_tmp_path / "run", built.layouts())
    store.load(0, built.model, trainer.optimizer)
    to_folder(built, shared_tmp_path / "start")
    assert not math.isnan(trainer.step(task, 0).loss)
    to_folder(built, shared_tmp_path / "later")
    built.destroy()
    before, start, later = (
        harness.whole_folder(folder)
        for folder in (source, shared_tmp_path / "start", shared_tmp_path / "later")
    )
    assert all(torch.equal(before[name], start[name]) for name in before)
    # The fp32 copies were those of the weights: a step moves all of them, by the learning rate,
    # which rounding hides in a norm's weights around 1.
    weights = [name for name in start if start[name].ndim == 2]
    assert [name for name in weights if torch.equal(start[name], later[name])] == []
    moved = max((start[name] - later[name]).float().abs().max().item() for name in weights)
    assert moved < 0.1
