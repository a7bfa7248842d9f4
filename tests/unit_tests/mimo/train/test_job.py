# SPDX-License-Identifier: Apache-2.0
"""What a recipe's ranks decide together: one outcome on all of them, before anything is lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch.distributed as dist

from megatron.core.models.mimo.data.conversation import Conversation, SampleError
from megatron.core.models.mimo.data.encoding import ChatEncoder, Encoded
from megatron.core.models.mimo.data.readers import ReadError
from megatron.core.models.mimo.data.sources import SourceError
from megatron.core.models.mimo.job.loop import TrainingLoop
from mimo_colocated.launch.errors import JobError
from mimo_colocated.train import data, evaluation, job
from mimo_colocated.train.answers import Answer, majority
from mimo_colocated.train.easy_vqa_model import train_tokenizer
from mimo_colocated.train.job import RecipeJob, RecipeLoop, RunOptions
from mimo_colocated.train.profile_steps import Profile
from mimo_colocated.train.recipe import (
    DataPart,
    EvaluationPart,
    ModelPart,
    Recipe,
    RunPart,
    SourcePart,
    TrainingPart,
)
from tests.unit_tests.mimo.data.small import TEMPLATE, WORDS, Listed, said
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld

NO, YES = (Conversation(said(["is it red"], answer)) for answer in ("no", "yes"))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_most_frequent_answer_is_that_of_samples_that_are_kept(ranks: int) -> None:
    """Every rank reads a part of them and none of what was skipped; a tie has one winner."""
    # "no" is counted first, wherever the ranks' parts begin.
    samples = [NO, SampleError("malformed", "no list"), YES, YES, NO]
    kept: Any = SimpleNamespace(numbers=np.array([0, 2, 3, 4]))
    tokens: Any = SimpleNamespace(numbers=np.arange(7))
    answers = [Answer(question="", wanted=each, said="") for each in ("no", "yes", "yes ")]

    def share(more: list[Any]) -> list[float]:
        whole: Any = SimpleNamespace(numbers=np.arange(len(more)))
        sources = [Listed(samples), None, Listed(more)]
        opened = data.Opened(sources, [kept, tokens, whole], (1.0, 1.0, 1.0))
        return InProcessWorld(ranks).run(lambda rank: majority(opened, answers))

    assert share([NO]) == [pytest.approx(1 / 3)] * ranks
    assert share([YES]) == [pytest.approx(2 / 3)] * ranks
    assert share([YES, NO]) == [pytest.approx(2 / 3)] * ranks


def test_what_is_skipped_is_told_by_data_set_and_the_first_by_name() -> None:
    """So that a folder of images that is a wrong one is found."""

    class Kept(list):  # type: ignore[type-arg]
        skipped: dict[str, int]
        first_skipped: str

    whole, some = Kept(range(3)), Kept(range(2))
    whole.skipped, whole.first_skipped = {}, ""
    some.skipped, some.first_skipped = {"unreadable": 2, "too_long": 1}, "sample 4 is unreadable"
    opened = data.Opened([None, None], cast(Any, [whole, some]), (1.0, 1.0))
    assert opened.summary() == (
        "5 samples, skipped: 1 too_long, 2 unreadable; of data set 1 3, the first: sample 4 is "
        "unreadable"
    )
    assert data.Opened([None], cast(Any, [whole]), (1.0,)).summary() == "3 samples, skipped: none"


def test_a_weight_that_leaves_nothing_of_a_data_set_is_one_sentence() -> None:
    opened = data.Opened([None], cast(Any, [range(24)]), (0.01,))
    part = DataPart([SourcePart("chat", {})])
    with pytest.raises(JobError, match=r"data\.train, counted from 0: source 0 has 24 samples"):
        data.training_stream(opened, part, 1, 4)


class Local(Listed):
    """A data set whose files each rank has for itself."""

    def __init__(self, rank: int) -> None:
        super().__init__([NO])
        self._rank = rank

    def fingerprint(self) -> str:
        return f"of rank {self._rank}"


@pytest.mark.parametrize("kind", ["chat", "tokens"])
def test_ranks_that_see_other_files_are_one_error_on_all(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any of them encodes: those that think the data is prepared would wait elsewhere."""
    world, raised = InProcessWorld(3), []
    monkeypatch.setattr(data, "open_source", lambda *_: Local(data.dist.get_rank() // 2))
    monkeypatch.setattr(data, "TokenFiles", lambda **_: Local(data.dist.get_rank() // 2))
    encoder: Any = SimpleNamespace(fingerprint=lambda: "one", encode=None)
    parts = [SourcePart(kind, {"path": "a.jsonl"})]

    def open_it(rank: int) -> None:
        text = 7 if kind == "tokens" else encoder
        with pytest.raises(JobError) as caught:
            data.open_data(parts, DataPart(parts), text, tmp_path, 0, False)
        raised.append(str(caught.value))

    world.run(open_it)
    assert len(raised) == 3
    assert set(raised) == {
        f"rank 2 sees other files than rank 0 for data of kind {kind} at a.jsonl; put the data "
        "where all ranks see the same files"
    }


@pytest.mark.usefixtures("alone")
def test_a_sample_that_cannot_be_used_ends_a_run_that_skips_none(tmp_path: Path) -> None:
    write_language(tmp_path)
    source, encoder = write_chat(tmp_path / "a.jsonl", "yes", ""), ChatEncoder(tmp_path, 100)
    said = r"sample 1 is malformed: .*; set data\.skip=true to leave out and count such sam"
    part = DataPart([source], skip=False)
    with pytest.raises(JobError, match=said):
        data.open_data([source], part, encoder, tmp_path / "prepared", 0, False)


@pytest.mark.usefixtures("one_rank")
def test_settings_that_token_files_do_not_have_are_named(tmp_path: Path) -> None:
    source = SourcePart("tokens", {"paths": "a.bin"})
    with pytest.raises(SourceError, match="data of kind 'tokens': .*keyword argument 'paths'"):
        data.open_data([source], DataPart([source]), 7, tmp_path, 0, False)


def test_sequences_that_a_layout_cannot_cut_are_refused() -> None:
    """Samples are padded alike in every layout."""
    model = SimpleNamespace(colocated_comms={})
    built = SimpleNamespace(composite=SimpleNamespace(encoders=()))
    runner: Any = SimpleNamespace(model=model, built=built, multiple=48)
    said = "pads samples to [0-9]+ tokens in every layout, and this one needs a multiple of 48; use"
    with pytest.raises(JobError, match=said):
        data.side_of(runner, DataPart([], sequences=2, capacity=96), 0, {}, {}, 1)


@pytest.mark.parametrize("error", [ReadError("x is gone"), SourceError("y"), ValueError("z")])
def test_a_batch_that_cannot_be_made_is_one_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a batch that is there is made once, however often it is asked for."""
    left = [SimpleNamespace(batch=SimpleNamespace(stop=7)), error]

    def made() -> Any:
        found = left.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    ahead = SimpleNamespace(next=made, waited_s=0.5)
    monkeypatch.setattr(data, "Ahead", lambda *_given: ahead)
    batches = data.StepData(cast(Any, None), 2, 1)
    assert batches.at(0) is batches.at(0)
    assert batches.position == 7
    with pytest.raises(JobError, match=str(error)):
        batches.at(1)
    assert batches.position == 7


def write_chat(path: Path, *answers: str) -> SourcePart:
    """Write conversations, the malformed ones as an empty answer; return the data set."""
    lines = [
        {"messages": [{"role": "user", "content": "is it"}, {"role": "assistant", "content": each}]}
        if each
        else {"messages": 5}
        for each in answers
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return SourcePart("chat", {"path": str(path)})


def write_language(folder: Path) -> None:
    """Write a language model's text, without its weights."""
    tokenizer = train_tokenizer(WORDS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')


def made(place: Path, held_out: list[SourcePart]) -> RecipeJob:
    parts = DataPart([write_chat(place / "train.jsonl", "yes", "no")], held_out)
    recipe = Recipe(
        "mine", ModelPart(str(place)), parts, TrainingPart(1, 1), RunPart(str(place / "run"))
    )
    return RecipeJob(recipe, place, {}, cast(Any, None), fresh=False, profile=None)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process, which stops where the model would be built."""

    def stop(*_: object) -> None:
        raise NotImplementedError("the model is built")

    monkeypatch.setattr(job, "check_model", stop)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_what_is_evaluated_is_opened_before_the_model_is_built(tmp_path: Path) -> None:
    write_language(tmp_path)
    with pytest.raises(NotImplementedError, match="the model is built"):
        made(tmp_path, [write_chat(tmp_path / "held_out.jsonl", "yes")])
    with pytest.raises(SourceError, match=r"nothing\.jsonl cannot be read: No such file"):
        made(tmp_path, [SourcePart("chat", {"path": str(tmp_path / "nothing.jsonl")})])
    with pytest.raises(SourceError, match="no sample of 1 is kept: {'malformed': 1}"):
        made(tmp_path, [write_chat(tmp_path / "bad.jsonl", "")])


def test_what_makes_other_prepared_data_has_another_name() -> None:
    def key(source: str = "s", text: str = "t", look: bool = True, answer_tokens: int = 8) -> str:
        said: list[Any] = [SimpleNamespace(fingerprint=str(own).strip) for own in (source, text)]
        return data._key(*said, DataPart([], look_at_images=look), answer_tokens)

    others = [
        {"source": "other"}, {"text": "other"}, {"look": False}, {"answer_tokens": 0},
        {"answer_tokens": 9}, {"source": "t", "text": "s"},
    ]  # fmt: skip
    assert len({key(), *(key(**each) for each in others)}) == 1 + len(others)
    assert key() == key()


@pytest.mark.parametrize("count", [1, 4, 6, 8])
def test_held_out_samples_count_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that the last ones do not fill is filled up, with what does not count."""
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    batches = SimpleNamespace(at=lambda start: SimpleNamespace(only=lambda most: (start, most)))
    made: Any = object.__new__(evaluation.Evaluation)
    made._part, made._between, made._measuring = EvaluationPart(batch=4), lambda: None, None
    made._batches = lambda _held_out, _side: (batches, count)
    counted = []
    made._runner = SimpleNamespace(held_out_loss=lambda batch: counted.append(batch) or (6.0, 2.0))
    assert made._loss(None) == 3.0
    assert counted == [(start, count - start) for start in range(0, count, 4)]


def recipe_loop(out: Path, *, fresh: bool, steps: int = 1, before: int = 1) -> Any:
    """A loop over a run with a checkpoint of ``before`` steps in all; nothing is loaded."""
    part = TrainingPart(steps, 1)
    recipe = Recipe("mine", ModelPart("a"), DataPart([]), part, RunPart(str(out)))
    was = dataclasses.replace(recipe, training=TrainingPart(before, 1))
    found = object.__new__(RecipeLoop)
    found.options, found.rank = RunOptions.of(recipe, fresh=fresh), 0
    found._profile = None
    extra = {"options": {"recipe": dataclasses.asdict(was)}}
    manifest = SimpleNamespace(step=1, extra=extra)
    there = found.options.out / "checkpoints"
    found.store = SimpleNamespace(
        root=there, steps=lambda: [1] if there.exists() else [], manifest=lambda _step: manifest
    )
    found._load = lambda _manifest: None
    built = SimpleNamespace(source="a", layouts=dict, named_parameters=list)
    found.trainer = SimpleNamespace(built=built)
    found.opened = data.Opened([], [], ())
    return found


LEFT = ("recipe.yaml", "run.json", "answers.json", "summary.json", "exported", "checkpoints")


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What a run left, and what every run of the folder may use again."""
    for name in (*LEFT, "prepared", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("")
        if "." in name:
            shutil.rmtree(tmp_path / name)
            (tmp_path / name).write_text("old")
    return tmp_path


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *_, **__: None)


@pytest.mark.usefixtures("one_rank")
def test_what_a_run_left_is_set_aside_whole(left: Path) -> None:
    recipe_loop(left, fresh=True).start()
    aside = left / "previous" / "1"
    assert sorted(path.name for path in aside.iterdir()) == sorted(LEFT)
    assert (aside / "recipe.yaml").read_text() == "old"
    assert (left / "recipe.yaml").read_text().startswith("name: mine")
    assert json.loads((left / "run.json").read_text())["ranks"] == 1
    assert (left / "prepared" / "old").exists()
    assert (left / "model" / "old").exists()


def test_a_refused_run_changes_nothing_of_the_one_that_is_there(left: Path) -> None:
    with pytest.raises(JobError, match=r"holds a run with training\.steps=2, this one has 1"):
        recipe_loop(left, fresh=False, before=2).start()
    done_already = recipe_loop(left, fresh=False)
    done_already._profile = Profile(1, 4, None)
    with pytest.raises(JobError, match="goes on after step 1; give steps from 2 on, or --fresh"):
        done_already.start()
    assert {(left / name).read_text() for name in LEFT if "." in name} == {"old"}
    assert recipe_loop(left, fresh=False).start() == 1
    assert (left / "recipe.yaml").read_text().startswith("name: mine")


@pytest.mark.usefixtures("alone")
def test_samples_that_are_asked_nothing_are_no_questions(tmp_path: Path) -> None:
    """Their last turn is no answer; they are counted, and what was asked is not what is wanted."""
    write_language(tmp_path)
    source = write_chat(tmp_path / "held_out.jsonl", "yes", "")
    turns = [json.loads((tmp_path / "held_out.jsonl").read_text().splitlines()[0])["messages"][0]]
    with (tmp_path / "held_out.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"messages": turns}))
    encoder = ChatEncoder(tmp_path, 100)
    opened = data.open_data([source], DataPart([source]), encoder, tmp_path / "prepared", 4, False)
    assert opened.prepared[0].numbers.tolist() == [0]
    assert opened.skipped() == {"malformed": 1, "no_supervision": 1}


@pytest.mark.usefixtures("alone", "one_rank")
@pytest.mark.parametrize(
    "answers", [["yes", "no", "yes"], ["yes", ""], ["", "no"], ["no no", "no"]]
)
def test_a_run_does_not_go_on_in_the_midst_of_other_samples(
    answers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A position counts samples that are kept: other ones would be seen twice, or never."""
    write_language(tmp_path)
    encoder, loaded = ChatEncoder(tmp_path, 100), []

    def opened(*said: str) -> data.Opened:
        source = write_chat(tmp_path / f"{len(said)}{said}.jsonl", *said)
        place = tmp_path / "prepared"
        return data.open_data([source], DataPart([source]), encoder, place, 0, False)

    def loop(*said: str) -> Any:
        found = recipe_loop(tmp_path, fresh=False)
        del found._load
        found.data = SimpleNamespace(position=7)
        found.opened = opened(*said)
        return found

    monkeypatch.setattr(job, "source_of", lambda *_: {})
    monkeypatch.setattr(TrainingLoop, "_load", lambda _self, manifest: loaded.append(manifest))
    saved = SimpleNamespace(step=1, extra=json.loads(json.dumps(loop("yes", "no").more_to_save())))
    again = loop("yes", "no")
    again.data.position = 0
    again._load(saved)
    assert again.data.position == 7
    for same in (True, False):  # links that lose packets go on in their layout only
        anew: list[int] = []
        again.links = SimpleNamespace(start_anew=anew.append)
        again.store.same_layout = lambda _manifest, same=same: same
        again._load(saved)
        assert anew == [1] * (not same)
    del loaded[1:]
    with pytest.raises(JobError, match=r"over \[2\] samples, and its data has .* put the data"):
        loop(*answers)._load(saved)
    assert len(loaded) == 1  # nothing of a refused one


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_was_unreadable_is_tried_again_by_a_run_that_begins(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that goes on keeps the samples that it began with."""
    late = [SampleError("unreadable", "not there yet")]
    source = Listed([NO, *late, YES])
    monkeypatch.setattr(data, "open_source", lambda *_: source)
    nothing, two = np.zeros((0, 3), dtype=np.int32), np.array([1, 2], dtype=np.int32)
    made = Encoded(two, two > 1, nothing[:, 0], nothing)
    encoder: Any = SimpleNamespace(fingerprint=lambda: "one", encode=lambda _: made)
    parts = [SourcePart("chat", {})]

    def kept(retry: bool) -> list[int]:
        def open_it(_rank: int) -> list[int]:
            opened = data.open_data(parts, DataPart(parts), encoder, tmp_path, 0, retry)
            return np.asarray(opened.prepared[0].numbers).tolist()

        first, *others = InProcessWorld(ranks).run(open_it)
        assert all(other == first for other in others)
        return first

    assert kept(True) == [0, 2]
    source.samples[1] = NO
    assert kept(False) == [0, 2]
    assert kept(True) == [0, 1, 2]
