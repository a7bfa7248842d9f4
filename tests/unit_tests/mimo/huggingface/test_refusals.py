# SPDX-License-Identifier: Apache-2.0
"""What cannot be the same function is refused in one sentence before any weight is read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file

from megatron.core.models.mimo.huggingface import build, configuration, fits, weights
from megatron.core.models.mimo.huggingface.composites import describe
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.huggingface.fits import LayoutError, check_fits
from megatron.core.models.mimo.huggingface.folder import FolderError, ModelFolder
from megatron.core.models.mimo.huggingface.target import Target, TargetError
from mimo_colocated.cli.models import folder_dtype
from mimo_colocated.launch.layouts import Layout
from tests.imported.plan import Row, rows
from tests.unit_tests.mimo.huggingface import llava_models, models, qwen_vl_models, sounds

LLAMA = models.SIZES


def _llama(**settings: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**{**LLAMA, **settings})


def _yarn() -> transformers.LlamaConfig:
    return _llama(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    )


UNSUPPORTED = [
    (transformers.MistralConfig(**LLAMA, sliding_window=8), "sliding_window=8.*window of 8 tokens"),
    (_yarn(), "rope_type='yarn' is not supported; default, linear, llama3"),
    (_llama(attention_bias=True), "attention_bias=True is not supported: biases"),
    (_llama(mlp_bias=True), "attention_bias=False is not supported: biases"),
    (_llama(hidden_act="mish"), "activation 'mish' is not supported; known are"),
    (_llama(quantization_config={"quant_method": "x"}), "quantized weights cannot be trained"),
    (
        _llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                "partial_rotary_factor": 0.5}),
        "llama: partial_rotary_factor=0.5 is not supported; only 1.0 is",
    ),
    (
        transformers.GPT2Config(scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx=True.*scaled by layer",
    ),
    (
        transformers.MixtralConfig(**LLAMA, router_jitter_noise=0.1),
        "router_jitter_noise=0.1 is not supported; only its default, 0.0",
    ),
    (transformers.Gemma2Config(), "model_type 'gemma2' is not known; known are gpt2, llama"),
]


@pytest.mark.parametrize(("config", "sentence"), UNSUPPORTED)
def test_a_setting_that_would_change_the_result_is_refused(config: Any, sentence: str) -> None:
    with pytest.raises(UnsupportedModelError, match=sentence):
        _read(config)


def _read(config: Any) -> None:
    part = describe(config).language
    build.module_config(part.family, part.config, Layout(), build.BuildOptions())
    part.family.params(config)


def test_what_every_configuration_has_is_not_refused() -> None:
    _read(_llama(use_cache=False, initializer_range=0.5, pretraining_tp=2))


@pytest.mark.parametrize(
    ("layouts", "sentence"),
    [
        (
            {"language": Layout(tp=8)},
            r"tp=8 does not divide its 4 key/value heads; tp can be \[1, 2, 4\]",
        ),
        ({"language": Layout(pp=4)}, "pp=4 does not divide its 2 layers.*try --language"),
        ({"language": Layout(tp=64)}, "tp=64 does not divide its MLP width of 48"),
        ({}, r"given for \[\], but the model's modules are \['language'\]"),
        (
            {"language": Layout(), "images": Layout()},
            r"given for \['images', 'language'\], but the model's modules are \['language'\]",
        ),
    ],
)
def test_layouts_that_the_model_cannot_be_cut_into(
    layouts: dict[str, Layout], sentence: str
) -> None:
    with pytest.raises(LayoutError, match=sentence):
        check_fits(describe(_llama()), layouts, sequence_parallel=False)


def test_encoders_that_are_not_cut_over_cp_are_refused_by_name() -> None:
    cut, language = Layout(cp=2, dp=4), {"language": Layout(tp=2, dp=4)}
    clip = describe(llava_models.llava("clip-llama").config)
    check_fits(clip, {"images": cut, **language}, sequence_parallel=False)
    qwen = describe(qwen_vl_models.MODELS["qwen2_5_vl"]().config)
    hears = describe(sounds.task().model.config)
    for composite, name, kind, native in (
        (qwen, "images", "qwen2_5_vl.*", ()),
        (hears, "audio", "qwen2_audio_encoder", ()),
        (clip, "images", "torch-native encoder", ["images"]),
    ):
        said = f"{name} cp=2: a {kind} takes whole items .* its tp or dp; try --{name} tp=1,dp=8 --"
        with pytest.raises(LayoutError, match=said):
            check_fits(
                composite, {name: cut, **language}, sequence_parallel=False, torch_native=native
            )


def test_heads_of_an_encoder_divide_by_tp_and_cp() -> None:
    layouts = {"images": Layout(tp=4, cp=2), "language": Layout(tp=2, dp=4)}
    said = r"images tp=4 \* cp=2 does not divide its 4 attention heads; try --images tp=4,dp=2 "
    clip = describe(llava_models.llava("clip-llama").config)
    with pytest.raises(LayoutError, match=said):
        check_fits(clip, layouts, sequence_parallel=False)


def test_experts_over_tp_want_sequence_parallelism() -> None:
    composite = describe(transformers.MixtralConfig(**LLAMA, num_local_experts=4))
    layouts = {"language": Layout(tp=2, dp=4)}
    with pytest.raises(LayoutError, match="experts needs --sequence-parallel"):
        check_fits(composite, layouts, sequence_parallel=False)
    check_fits(composite, layouts, sequence_parallel=True)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    models.DENSE["llama"]().save_pretrained(tmp_path)
    return tmp_path


def _with(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


_QUERY = "model.layers.1.self_attn.q_proj.weight"
DAMAGED = [
    (lambda t: t.pop(_QUERY), rf"made of \['{_QUERY}'\], which the folder does not have"),
    (
        lambda t: t.update(surplus=t["model.norm.weight"].clone()),
        r"tensors that the model has no place for: \['surplus'\]",
    ),
    (
        lambda t: t.update({_QUERY: t[_QUERY][:, :-1].contiguous()}),
        rf"'{_QUERY}' has shape \[32, 31\], which does not make",
    ),
    (
        lambda t: t.update({_QUERY: t[_QUERY][:-4].contiguous()}),
        rf"'{_QUERY}' has shape \[28, 32\], which does not make",
    ),
    (
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1].contiguous()}),
        r"'model.norm.weight' has shape \[31\], which does not make",
    ),
    (
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"][None].contiguous()}),
        r"'model.norm.weight' has shape \[1, 32\], which does not make",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), DAMAGED)
def test_folders_of_another_model_are_refused_before_a_weight_is_read(
    change: Any, sentence: str, folder: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with(folder, change)
    monkeypatch.setattr(build, "load", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(FolderError, match=sentence):
        build.from_folder(folder, {"language": Layout()})


def test_a_folder_that_is_cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FolderError, match="it was cut short; download it again"):
        ModelFolder(folder)


def _file(header: Any, tensors: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


NO_TENSORS = {
    "empty": (b"", "is no whole safetensors file"),
    "a page": (b"<!DOCTYPE html><title>404</title>", "is no whole safetensors file"),
    "cut in its header": (_file({"x": {}})[:-1], "is no whole safetensors file"),
    "no JSON": (_file(b"{{"), "is no safetensors file"),
    "a list": (_file([1]), "is no safetensors file"),
    "no text": (_file(b'"\xff"'), "is no safetensors file"),
    "no offsets": (_file({"x": {"dtype": "F32"}}), "is no safetensors file"),
    "no dtype": (_file({"x": {"data_offsets": [0, 4], "shape": [1]}}, b"1234"), "is no safeten"),
    "no shape": (_file({"x": {"data_offsets": [0, 4], "dtype": "F32"}}, b"1234"), "is no safet"),
    "three offsets": (
        _file({"x": {"data_offsets": [0, 4, 4], "dtype": "F32", "shape": [1]}}, b"1234"),
        "is no safetensors file",
    ),
    "words": (_file({"x": {"data_offsets": ["a", "b"], "dtype": "F32", "shape": []}}), "is no saf"),
    "bits": (
        _file({"x": {"data_offsets": [0, 4], "dtype": "F8_E8M0", "shape": [4]}}, b"1234"),
        r"holds \['F8_E8M0'\], which are not weights to train; save it in bfloat16, float16 or",
    ),
}


@pytest.mark.parametrize("kind", NO_TENSORS)
def test_files_that_are_no_safetensors_are_named(kind: str, folder: Path) -> None:
    content, said = NO_TENSORS[kind]
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(FolderError, match=rf"model\.safetensors {said}"):
        ModelFolder(folder)


def test_a_tensor_of_no_elements_is_read(folder: Path) -> None:
    _with(folder, lambda t: t.update(none=torch.empty(0, 3)))
    with ModelFolder(folder) as found:
        assert found.read("none").shape == (0, 3)


@pytest.mark.parametrize("left", [0, 1])
def test_a_file_that_is_cut_short_while_it_is_open(left: int, folder: Path) -> None:
    """What is left of a tensor is not taken for all of it."""
    with ModelFolder(folder) as found:
        name, described = max(found.tensors.items(), key=lambda each: each[1].begin)
        os.truncate(folder / described.file, described.begin + left)
        with pytest.raises(FolderError, match="was cut short while it was read"):
            found.read(name)


def test_what_is_no_model_folder(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="it has no config.json"):
        ModelFolder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FolderError, match=r"config\.json is not JSON"):
        ModelFolder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FolderError, match=r"\['pytorch_model.bin'\]: open it with transformers"):
        ModelFolder(tmp_path)
    index: dict[str, Any] = {"weight_map": ["model-00001-of-00002.safetensors"]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FolderError, match=r"index\.json has no weight_map; download it again"):
        ModelFolder(tmp_path)
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FolderError, match=r"names \['model-00001-of-00002.safetensors'\]"):
        ModelFolder(tmp_path)


@pytest.mark.parametrize("row", [row for row in rows() if row.world == 1], ids=str)
def test_headers_of_every_kind_of_model_are_compared(
    row: Row, tmp_path: Path, one_rank: None
) -> None:
    row.task().model.save_pretrained(tmp_path)
    build.check_headers(tmp_path)
    # The control.
    _with(tmp_path, lambda tensors: tensors.pop(next(iter(tensors))))
    with pytest.raises(FolderError, match="which the folder does not have"):
        build.check_headers(tmp_path)


def test_every_rank_says_what_one_rank_found(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A rank whose own tensors are fine raises the other's sentence."""
    monkeypatch.setattr(weights, "gathered", lambda own: [own, (["x: is missing"], [])])
    with ModelFolder(folder) as opened, pytest.raises(FolderError, match="x: is missing"):
        weights.check([], [], opened, headers_only=True)


def test_a_tied_output_layer_that_is_stored_and_differs_is_refused(
    tmp_path: Path, one_rank: None
) -> None:
    """Transformers would keep both; alike, the second one is the first."""
    models.DENSE["qwen2-tied"]().save_pretrained(tmp_path)
    embedding = "model.embed_tokens.weight"
    _with(tmp_path, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    build.from_folder(tmp_path, {"language": Layout()}).destroy()
    _with(tmp_path, lambda t: t["lm_head.weight"][7].add_(1e-3))
    with pytest.raises(FolderError, match="'lm_head.weight' is not 'model.embed_tokens.weight'"):
        build.from_folder(tmp_path, {"language": Layout()})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"model_type": "frob"}', r"cannot read .*config\.json: .*frob"),
        (
            '{"model_type": "frob", "auto_map": {"AutoConfig": "frob.FrobConfig"}}',
            r"cannot read .*config\.json: .*(custom code|trust_remote_code)",
        ),
        (
            '{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 3}',
            r"cannot read .*config\.json: .*multiple of the number of attention heads",
        ),
    ],
)
def test_a_configuration_that_transformers_refuses_is_one_sentence(
    text: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "frob.py").write_text("raise AssertionError('code of the folder was run')")
    with pytest.raises(UnsupportedModelError, match=sentence) as error:
        configuration.read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_configuration_that_is_a_list(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FolderError, match=r"config\.json is no JSON object"):
        ModelFolder(tmp_path)


def test_a_token_outside_the_vocabulary_stands_for_nothing() -> None:
    composite = describe(_llama())
    part = SimpleNamespace(modality="images", token_id=models.VOCABULARY)
    beside = SimpleNamespace(language=composite.language, encoders=(part,))
    with pytest.raises(UnsupportedModelError, match="images, 99, is not one of the .* 99; enlarge"):
        fits._check_tokens(beside)
    part.token_id -= 1
    fits._check_tokens(beside)


def test_what_travels_with_a_model_and_what_does_not(folder: Path) -> None:
    """Weights of other programs would be stale beside new ones, a model within without its own."""
    there = ["tokenizer.json", "sub/chat_template.jinja"]
    away = ["onnx/model.onnx", "rust_model.ot", "pytorch_model.bin.index.json", "m.gguf"]
    away += ["inner/config.json", "inner/tokenizer.json"]
    for name in [*there, *away]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    with ModelFolder(folder) as opened:
        found = set(opened.others())
    assert found == {"config.json", "generation_config.json", *there}


def test_nothing_but_the_model_is_replaced(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = tmp_path_factory.mktemp("beside") / "old"
    target.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json"):
        (target / name).touch()
    (folder / "tokenizer.json").touch()
    source = ModelFolder(folder)
    with pytest.raises(TargetError, match="exists and is not empty"):
        Target(target, source=source).check()
    Target(target, overwrite=True, source=source).check()
    (target / "checkpoints").mkdir()
    (target / "checkpoints" / "step.pt").touch()
    with pytest.raises(TargetError, match=r"does not replace: \['checkpoints/step.pt'\]; move it"):
        Target(target, overwrite=True, source=source).check()


def test_a_place_that_is_taken_otherwise_is_refused(tmp_path: Path) -> None:
    target = Target(tmp_path / "out", overwrite=True)
    (tmp_path / "out").write_text("notes")
    with pytest.raises(TargetError, match="out is a file; give a folder that does not exist"):
        target.check()
    assert (tmp_path / "out").read_text() == "notes"
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    target.check()  # nothing is lost
    (tmp_path / ".out.replaced").mkdir()
    with pytest.raises(TargetError, match=r"\.out\.replaced is what an interrupted export was to"):
        target.check()


def test_exports_to_one_place_go_one_after_the_other(tmp_path: Path) -> None:
    """Halves of a killed one are no part of the next one."""
    half = tmp_path / ".out.exporting"
    (half / "sub").mkdir(parents=True)
    (half / "config.json").touch()
    first, second = (Target(tmp_path / "out") for _ in range(2))
    first.begin(0)
    assert [path.name for path in half.iterdir()] == [".lock"]
    with pytest.raises(TargetError, match="another export writes to .*out now; wait for it"):
        second.begin(0)
    second.abandon()
    (half / "config.json").write_text("whole")
    first.publish()
    assert (tmp_path / "out" / "config.json").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", [".", "sub", ".."])
def test_a_model_is_not_written_into_the_folder_it_comes_from(place: str, folder: Path) -> None:
    source = ModelFolder(folder)
    with pytest.raises(TargetError, match="are the same or within one another"):
        Target(folder / place, overwrite=True, source=source).check()
    Target(folder.with_name("not there"), source=source).check()


def test_all_weights_of_a_folder_fit_the_dtype_that_is_chosen(folder: Path) -> None:
    def halve(tensors: Any) -> None:
        tensors.update({name: each.bfloat16() for name, each in tensors.items()})

    _with(folder, halve)
    assert folder_dtype(folder) == "bfloat16"
    _with(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}))
    assert folder_dtype(folder) == "float32"
