# SPDX-License-Identifier: Apache-2.0
"""What the tables hold, and how rows and options are chosen. One process."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from campaigns.command import CampaignError, parse
from examples.mimo.digits.options import HEADS, SEQUENCE_LENGTH
from mimo_colocated.launch.layouts import Layout, Layouts, Limits, misfits
from tests.parity.campaign import Parity
from tests.parity.measure import EXPERTS, SIZE, TEXT_SIZE
from tests.parity.rows import DEFAULT_ROWS, NIGHTLY_ROWS, Row

pytestmark = pytest.mark.once

IMAGES = [row for row in DEFAULT_ROWS if row.vision]
STAGES = [row for row in DEFAULT_ROWS if row.name.startswith("pp")]
TEXT = [row for row in DEFAULT_ROWS if not row.vision]


def layouts(row: Row) -> Layouts:
    encoders = {"vision": row.vision} | ({"audio": row.audio} if row.audio else {})
    parsed = {name: Layout.parse(text, name) for name, text in encoders.items()}
    return Layouts(parsed, Layout.parse(row.language, "language"))


def test_names_are_unique() -> None:
    assert len({row.name for row in NIGHTLY_ROWS}) == len(NIGHTLY_ROWS)


def test_the_language_model_alone_has_every_layout_tied_and_untied() -> None:
    wanted = {(1, 1, 4), (4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1), (2, 2, 2)}
    found = set()
    for row in TEXT:
        sizes = dict(part.split("=") for part in row.language.split(","))
        found.add((int(sizes["tp"]), int(sizes["pp"]), int(sizes["dp"]), row.tied))
    assert found == set(itertools.chain(*(((*w, False), (*w, True)) for w in wanted)))
    assert {row.world_size for row in TEXT} == {4, 8}


def test_the_default_rows_have_every_direction_at_every_cp() -> None:
    def direction(pair: Layouts) -> str:
        vision, language = pair.encoders["vision"].dp, pair.language.dp
        return "in" if vision > language else "out" if vision < language else "equal"

    found = {(direction(layouts(row)), layouts(row).language.cp) for row in IMAGES}
    assert found == set(itertools.product(("in", "out", "equal"), (1, 2, 4)))


@pytest.mark.parametrize(
    "values",
    [
        {"sequence_parallel": {False, True}},
        {"distributed_optimizer": {False, True}},
        {"micro_batches": {1, 4, 8}},
        {"masks": {"uniform", "uneven", "one_sample", "none"}},
        {"freeze": {"", "encoder+projector", "encoder+language", "language", "lower-encoder"}},
        {"dtype": {"float32", "bfloat16", "float16"}},
        {"experts": {False, True}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_the_default_rows_have_every_option_both_ways(values) -> None:
    ((field, wanted),) = values.items()
    assert {getattr(row, field) for row in IMAGES} == wanted


def test_rows_with_stages_have_every_other_way_to_cut_too() -> None:
    cuts = [layouts(row).language for row in STAGES]
    assert {cut.pp for cut in cuts} == {2, 4}
    for axis in ("tp", "cp", "dp"):
        assert {getattr(cut, axis) for cut in cuts} == {1, 2}
    assert {row.micro_batches for row in STAGES} == {1, 4, 8}
    assert {row.images for row in STAGES} == {"all", "mixed"}
    assert {row.virtual_stages for row in STAGES} == {1, 2}
    assert {row.encode_ahead for row in STAGES} == {0, 1, 2}
    assert {layouts(row).language.pp for row in STAGES if row.encode_in_bubbles} == {2, 4}


def test_rows_with_two_encoders_have_every_direction_bridge_and_stages() -> None:
    rows = [row for row in IMAGES if row.audio]
    directions = set()
    for row in rows:
        pair = layouts(row)
        for encoder in pair.encoders.values():
            directions.add((encoder.dp > pair.language.dp) - (encoder.dp < pair.language.dp))
    assert directions == {-1, 0, 1}
    assert {row.bridge for row in rows} == {"routed", "gather"}
    assert {layouts(row).language.pp for row in rows} == {1, 2}
    assert {row.packed for row in rows} == {False, True}
    assert any(row.audio != row.vision for row in rows)


def test_every_row_fits_its_model_and_batch() -> None:
    for row in NIGHTLY_ROWS:
        if row.vision:
            assert row.world_size == 8
            limits = Limits(
                row.reference(8).batch,
                row.micro_batches,
                sequence_parallel=row.sequence_parallel,
                world_size=8,
                sequence_length=SEQUENCE_LENGTH,
                heads={
                    "vision": SIZE.vision_heads,
                    "audio": SIZE.audio_heads,
                    "language": SIZE.language_query_groups,
                },
                experts=EXPERTS.count if row.experts else 0,
                language_layers=row.layers,
                virtual_stages=row.virtual_stages,
                cut_items=("vision", "audio"),
            )
            assert misfits(layouts(row), limits) == [], row.name
        else:
            sizes = dict(part.split("=") for part in row.language.split(","))
            assert TEXT_SIZE.language_layers % int(sizes["pp"]) == 0
            assert TEXT_SIZE.language_query_groups % int(sizes["tp"]) == 0


def test_the_nightly_rows_have_every_pair_that_fits() -> None:
    powers = (1, 2, 4, 8)
    visions = [Layout(tp, 1, 8 // tp) for tp in powers]
    languages = [
        Layout(tp, cp, 8 // (tp * cp)) for tp in powers for cp in powers if tp * cp <= 8
    ]
    limits = Limits(
        32, sequence_length=SEQUENCE_LENGTH, heads={"vision": HEADS, "language": HEADS}
    )
    pairs = (Layouts({"vision": v}, language) for v in visions for language in languages)
    wanted = {str(pair) for pair in pairs if not misfits(pair, limits)}
    assert len(wanted) == 40
    assert wanted == {str(layouts(row)) for row in NIGHTLY_ROWS if row.name.startswith("pair-")}


def chosen(argv: list[str], environment: dict[str, str]) -> Parity:
    parity = Parity(environment=environment)
    given = parse(parity, argv)
    parity.choose(given)
    parity.resumed = parity.resumes(given)
    return parity


def test_options_come_from_the_command_line_then_the_environment_then_the_defaults() -> None:
    environment = {"THRESH": "1e-3", "TRAIN_STEPS": "5", "LAYOUTS": "bf16, fan-*-cp4*"}
    parity = chosen(["--thresh", "1e-2"], environment)
    assert (parity.thresh, parity.steps, parity.micro_batches) == (1e-2, 5, 8)
    assert list(parity.rows) == ["fan-in-cp4-sp", "fan-out-cp4", "bf16"]
    assert tuple(chosen([], {}).rows.values()) == DEFAULT_ROWS
    assert (chosen([], {}).thresh, chosen([], {}).steps) == (1e-4, 10)
    assert tuple(chosen([], {"LAYOUTS": "", "THRESH": ""}).rows.values()) == DEFAULT_ROWS
    assert tuple(chosen(["--nightly"], {}).rows.values()) == NIGHTLY_ROWS


def test_only_nightly_resumes_and_has_a_folder_of_its_own() -> None:
    assert not chosen([], {}).resumed
    assert chosen(["--nightly"], {}).resumed
    assert not chosen(["--nightly", "--fresh"], {}).resumed
    assert chosen([], {}).folder == Path("runs/parity")
    assert chosen(["--nightly"], {}).folder != Path("runs/parity")


@pytest.mark.parametrize(
    "argv, environment, message",
    [
        (["--layouts", "fan-on"], {}, r"^LAYOUTS names 'fan-on', .* rows are text-dp4-untied, "),
        ([], {"LAYOUTS": "bf16,tp9"}, r"^LAYOUTS names 'tp9', .*, bf16, pp2-"),
        ([], {"THRESH": "0"}, r"^THRESH must be a number above 0, got '0'$"),
        (["--thresh", "nan"], {}, r"^THRESH must be a number above 0, got 'nan'$"),
        ([], {"TRAIN_STEPS": "2"}, r"^TRAIN_STEPS must be a whole number from 3 to 10000, got '2'"),
        ([], {"MICRO_BATCHES": "two"}, r"^MICRO_BATCHES must be a whole number from 1 .* 'two'$"),
        (["--layout", "bf16"], {}, r"^unrecognized arguments: --layout bf16; --help lists"),
    ],
)
def test_bad_options_are_one_sentence(argv, environment, message) -> None:
    with pytest.raises(CampaignError, match=message):
        chosen(argv, environment)


def test_the_page_in_docs_has_the_rows_of_the_table() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "parity.md").read_text()
    names = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    rows = names[names.index("row") + 1 : names.index("check")]
    assert rows == [row.name for row in DEFAULT_ROWS]
