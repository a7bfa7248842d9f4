# SPDX-License-Identifier: Apache-2.0
"""Stock's methods on stand-ins: ours read nothing more of them and call their parts alike.

Each case runs stock's method on stand-ins that note what is read, then ours on stand-ins that have
nothing else. A method of stock's without a case fails the last test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.config.role import ModuleLayout
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.optimizer import MimoOptimizer, ModuleOptimizerInfo
from megatron.core.models.mimo.partition import utils
from megatron.core.models.mimo.partition.utils import PartitionAdapter, PartitionConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from tests.unit_tests.mimo.spies import Spy, Watch, plain
from tests.unit_tests.mimo.stock_interface import PACKAGE, VERSION, stock_module

STOCK_MODEL = stock_module(f"{PACKAGE}.model.base").MimoModel
H, IMAGE = 4, 9
IDS = torch.tensor([[1, IMAGE, 2, 3], [IMAGE, 4, 5, IMAGE]])
ROWS = torch.arange(3 * H, dtype=torch.float32).view(3, H)
MASK, LABELS = torch.ones(2, 4), torch.arange(8).view(2, 4)
INPUTS = {"images": {"vit": {"x": ROWS}}}
# Without max_seqlen stock passes None on, on which rotary embeddings fail; here it is found.
_ENDS = torch.tensor([0, 4])
PACKING = {"cu_seqlens_q": _ENDS, "cu_seqlens_kv": _ENDS, "max_seqlen_q": 4, "max_seqlen_kv": 4}

# Stand-ins for ``self``, by method: what to call it with.
Case = Callable[[Watch], tuple[dict[str, Any], tuple[Any, ...]]]



def language_model(watch: Watch) -> Spy:
    def embed(input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        return input_ids.float().transpose(0, 1).unsqueeze(-1).expand(-1, -1, H)

    def call(**given: Any) -> torch.Tensor:
        return torch.ones(2)

    def set_input_tensor(tensor: Any) -> None:
        pass

    return watch.spy("language", embedding=embed, call=call, set_input_tensor=set_input_tensor)


def submodule(watch: Watch) -> Spy:
    def forward(encoder_inputs: Any, hidden_states: Any = None) -> Any:
        return None if encoder_inputs is None else encoder_inputs["vit"]["x"]

    return watch.spy("images", forward=forward)


def adapter(watch: Watch, **cfg: Any) -> Spy:
    def shard(embeddings: Any, labels: Any, loss_mask: Any, packed_seq_params: Any) -> Any:
        half = None if embeddings is None else embeddings[:2]
        return half, labels[:, :2], loss_mask[:, :2], packed_seq_params

    return watch.spy("adapter", shard=shard, cfg=watch.spy("cfg", **cfg))


def bridge(watch: Watch) -> Spy:
    def communicate(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1

    def destroy() -> None:
        pass

    return watch.spy("bridge", communicate=communicate, destroy=destroy)


def role(watch: Watch, mode: ModuleLayout, names: list[str], first: bool = True) -> Spy:
    return watch.spy(
        "role",
        mode=mode,
        modality_module_names=[name for name in names if name != "language"],
        has_modality_modules=names != ["language"],
        has_language_module="language" in names,
        is_first_stage=lambda name: first,
        is_last_stage=lambda name: first,
    )


def whole(watch: Watch, **more: Any) -> dict[str, Any]:
    """All that a colocated model has."""
    return {
        "modality_submodules": {"images": submodule(watch)},
        "language_model": language_model(watch),
        "special_token_ids": {"images": IMAGE},
        "colocated_comms": {("images", "language"): bridge(watch)},
        "partition_adapter": adapter(watch, use_cp=False, seq_parallel=True),
        "role": role(watch, ModuleLayout.COLOCATED, ["images", "language"]),
        "input_tensors": None,
        **more,
    }


def replaced(watch: Watch) -> dict[str, Any]:
    """A stand-in whose helpers are all replaced."""
    return {
        **whole(watch),
        "_build_packed_seq_params": lambda packing_kwargs: watch.spy("packed"),
        "_apply_colocated_comms": lambda modality_embeddings: {"images": ROWS[:1]},
        "get_text_embeddings": lambda input_ids, position_ids, special_token_ids: ROWS[:2],
        "align_embeddings_by_token_positions": lambda **given: ROWS,
        "_shard_language_inputs": lambda **given: (ROWS[:1], LABELS, MASK[:1], None),
    }


def part(watch: Watch, name: str, **options: Any) -> Any:
    """A wrapped module with overlap, as far as stock looks."""
    methods = (
        "no_sync enable_forward_pre_hook disable_forward_pre_hook start_param_sync start_grad_sync "
        "free_overlap_buffers zero_grad_buffer"
    )
    values = {method: _nothing() for method in methods.split()}
    return watch.spy(name, ddp_config=watch.spy("ddp_config", **options), **values)


def _nothing() -> Callable[..., Any]:
    def nothing(*args: Any, **kwargs: Any) -> Any:
        return MagicMock()

    return nothing


def wrapped(watch: Watch) -> dict[str, Any]:
    def modules() -> list[Any]:
        options = {"overlap_grad_reduce": True, "overlap_param_gather": True}
        return [part(watch, "ddp", **options)]

    return {"_active_ddp_modules": modules, "_active_submodules": modules}


def config_of(watch: Watch, **more: Any) -> Spy:
    language = watch.spy("config", hidden_size=H, params_dtype=torch.float32)
    spec = ModuleSpec(module=nn.Identity, params={"config": language})
    return watch.spy("mimo_config", language_model_spec=spec, **more)


def _built(watch: Watch) -> dict[str, Any]:
    class Built:
        @staticmethod
        def from_spec(spec: ModuleSpec, **stages: bool) -> str:
            return f"built {sorted(stages.items())}"

    return {
        "mimo_config": config_of(
            watch, modality_submodules_spec={"images": ModuleSpec(module=Built)}
        ),
        "role": watch.spy(
            "role",
            modules={"images": watch.spy("stage", is_first_stage=True, is_last_stage=False)},
            has_language_module=True,
        ),
        "modality_submodules": {},
    }


def encoders(watch: Watch) -> dict[str, Any]:
    grid = watch.spy("grid", shape=[1, 2], dim_names=["tp", "dp"])
    return {
        "role": role(watch, ModuleLayout.NON_COLOCATED, ["images"]),
        "modality_submodules": {"images": submodule(watch)},
        "special_token_ids": {"images": IMAGE},
        "mimo_config": config_of(watch, module_to_grid_map={"images": grid, "language": grid}),
        "input_tensors": None,
    }


def language(watch: Watch, first: bool = True) -> dict[str, Any]:
    made = role(watch, ModuleLayout.NON_COLOCATED, ["language"], first)
    return {**whole(watch), "role": made, "input_tensors": {"images": ROWS}}


FORWARD = (IDS, None, None, MASK, LABELS)
CASES: dict[str, list[Case]] = {
    "forward": [
        lambda w: (whole(w), (*FORWARD, INPUTS)),
        lambda w: (replaced(w), (*FORWARD, INPUTS, {})),
        lambda w: (encoders(w), (IDS, None, None, MASK, LABELS, INPUTS)),
        lambda w: (language(w), FORWARD),
        lambda w: (
            {**whole(w), "_forward_all_modules": lambda a, b, c, d, e, f, g: "done"},
            (*FORWARD, INPUTS),
        ),
    ],
    "_forward_all_modules": [
        lambda w: (whole(w), (*FORWARD, INPUTS)),
        lambda w: (whole(w, partition_adapter=None, colocated_comms={}), (*FORWARD, INPUTS)),
        lambda w: (whole(w), (IDS[:1, 2:], None, None, MASK[:1, 2:], LABELS[:1, 2:], None)),
        lambda w: (replaced(w), (*FORWARD, INPUTS, {})),
    ],
    "_forward_language_module": [
        lambda w: (language(w), (*FORWARD, {"images": ROWS})),
        lambda w: (language(w, first=False), (*FORWARD, {"language": ROWS})),
        lambda w: (language(w, first=False), (*FORWARD, None, dict(PACKING))),
        lambda w: (
            {**replaced(w), "role": role(w, ModuleLayout.NON_COLOCATED, ["language"])},
            (*FORWARD, {"images": ROWS}),
        ),
    ],
    "_forward_encoders": [
        lambda w: (encoders(w), (IDS, INPUTS, None)),
        lambda w: (
            {**encoders(w), "_attach_modality_split_sizes": lambda a, b, c: None},
            (IDS, INPUTS, None),
        ),
        lambda w: (
            {
                **encoders(w),
                "_has_encoder_tokens": lambda a, b: False,
                "_empty_encoder_output": lambda a: ROWS[:0],
            },
            (IDS, None, None),
        ),
    ],
    "get_text_embeddings": [
        lambda w: (whole(w), (IDS, torch.arange(8).view(2, 4), {"images": IMAGE})),
        lambda w: (whole(w, partition_adapter=None), (IDS, None, {"images": IMAGE})),
    ],
    "align_embeddings_by_token_positions": [
        lambda w: ({}, ({"images": ROWS, "text": ROWS.repeat(2, 1)[:5]}, IDS, {"images": IMAGE})),
    ],
    "_shard_language_inputs": [lambda w: (whole(w), (ROWS.unsqueeze(1), LABELS, MASK))],
    "_apply_colocated_comms": [
        lambda w: ({"colocated_comms": whole(w)["colocated_comms"]}, ({"images": ROWS},))
    ],
    "_attach_modality_split_sizes": [
        lambda w: (encoders(w), (ROWS.clone(), IDS[:, :2], "images")),
    ],
    "_has_encoder_tokens": [lambda w: (encoders(w), (IDS, "images"))],
    "_empty_encoder_output": [lambda w: ({"mimo_config": config_of(w)}, ("images",))],
    "_build_packed_seq_params": [
        lambda w: ({}, (None,)),
        lambda w: ({}, (dict(PACKING),)),
    ],
    "set_input_tensor": [
        lambda w: ({"language_model": language_model(w)}, ([ROWS],)),
        lambda w: ({}, ({"language": [ROWS]},)),
        lambda w: ({"language_model": None}, (None,)),
    ],
    "_active_submodules": [
        lambda w: ({"language_model": part(w, "language"), "modality_submodules": {}}, ())
    ],
    "_active_ddp_modules": [lambda w: ({"_active_submodules": lambda: [part(w, "a")]}, ())],
    "_initialize_submodules": [lambda w: (_built(w), ())],
    "_initialize_language_model": [
        lambda w: (_built(w), ()),
        lambda w: ({"role": w.spy("role", has_language_module=False)}, ()),
    ],
    "_build_colocated_communicators": [
        lambda w: (
            {
                "mimo_config": config_of(
                    w, module_to_grid_map={"language": w.spy("grid", dim_names=["pp"])}
                )
            },
            (),
        )
    ],
    "destroy": [lambda w: ({"colocated_comms": {("images", "language"): bridge(w)}}, ())],
    "sharded_state_dict": [lambda w: ({"named_children": lambda: iter(())}, ())],
    **{
        name: [lambda w: (wrapped(w), ())]
        for name in (
            "no_sync",
            "enable_forward_pre_hook",
            "disable_forward_pre_hook",
            "start_param_sync",
            "start_grad_sync",
            "free_overlap_buffers",
            "zero_grad_buffer",
        )
    },
}


def run(method: str, owner: type, case: Case, allowed: set[tuple[str, str]] | None) -> Watch:
    """Call a method on the case's stand-in; the result is noted as the last call."""
    watch = Watch(owner, allowed)
    values, args = case(watch)
    result = getattr(owner, method)(watch.spy("self", **values), *args)
    if isinstance(result, Iterator):
        result = list(result)
    elif hasattr(result, "__enter__"):
        with result:
            pass
    split = getattr(args[0], "_mimo_bridge_split_sizes", None) if args else None
    watch.calls.append(("returned", plain(result), split))
    return watch


class TestBesideStock:
    # 0.16 has an older MIMO; what is played on stand-ins is that of 0.19.
    __test__ = not VERSION.startswith("0.16.")

    @pytest.mark.parametrize(
        "method, case",
        [pytest.param(m, c, id=f"{m}-{n}") for m in CASES for n, c in enumerate(CASES[m])],
    )
    def test_ours_reads_no_more_of_a_stand_in_and_calls_its_parts_as_stock_does(
        self, method: str, case: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
        stock = run(method, STOCK_MODEL, case, None)
        ours = run(method, MimoModel, case, stock.reads)
        assert ours.calls == stock.calls

    def test_every_method_of_stocks_model_has_a_case(self) -> None:
        methods = {n for n, v in vars(STOCK_MODEL).items() if isinstance(v, FunctionType)}
        assert methods - {"__init__"} == set(CASES)

    def test_reads_and_keywords_that_differ_are_noticed(self) -> None:
        class Other:
            def _has_encoder_tokens(self, ids: torch.Tensor, name: str) -> bool:
                return self.config is not None

            def _shard_language_inputs(self, *given: Any) -> Any:
                return self.partition_adapter.shard(*given, None)

        case = CASES["_has_encoder_tokens"][0]
        stock = run("_has_encoder_tokens", STOCK_MODEL, case, None)
        with pytest.raises(AttributeError, match="the stand-in self has no config"):
            run("_has_encoder_tokens", Other, case, stock.reads)
        case = CASES["_shard_language_inputs"][0]
        stock = run("_shard_language_inputs", STOCK_MODEL, case, None)
        assert run("_shard_language_inputs", Other, case, stock.reads).calls != stock.calls


@pytest.mark.parametrize("mock", [Mock, MagicMock])
def test_methods_work_on_mocks_that_answer_to_any_name(mock: type[Mock]) -> None:
    model = mock()
    model.role.mode = ModuleLayout.COLOCATED
    model.modality_submodules, model.colocated_comms = {}, {}
    model.special_token_ids = {}
    cut = torch.ones(1)
    model._shard_language_inputs.return_value = (cut, LABELS, MASK, None)
    output, loss_mask = MimoModel._forward_all_modules(model, *FORWARD, None)
    assert output is model.language_model.return_value
    assert loss_mask is MASK
    assert model.language_model.call_args.kwargs["decoder_input"] is cut
    assert MimoModel.forward(model, IDS) is model._forward_all_modules.return_value
    model._active_ddp_modules.return_value = []
    MimoModel.disable_forward_pre_hook(model)


def test_context_parallel_cut_takes_batch_first_and_returns_four(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = PartitionConfig(False, False, False, 8)
    given = (ROWS.view(1, 3, H), LABELS, MASK, None)
    assert PartitionAdapter(cfg)._apply_context_parallel(*given) == given
    monkeypatch.setattr(utils, "get_pg_size", lambda group: 2)
    monkeypatch.setattr(utils, "get_pg_rank", lambda group: 0)
    stand_in = SimpleNamespace(cfg=SimpleNamespace(use_cp=True, cp_group=object()))
    places = torch.arange(8.0).view(1, 8, 1)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 4, 8]))
    for packing, kept in ((None, [0, 1, 6, 7]), (packed, [0, 3, 4, 7])):
        cut = PartitionAdapter._apply_context_parallel(stand_in, places, None, None, packing)
        assert cut[0].flatten().tolist() == kept
        assert cut[1:] == (None, None, packing)


def test_shard_with_nothing_to_cut_takes_packed_sequences_of_any_length() -> None:
    adapter = PartitionAdapter(PartitionConfig(False, False, False, 8, kv_format="thd"))
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 3, 5]))
    given = (torch.ones(7, 1, H), torch.ones(1, 7), torch.ones(1, 7), packed)
    assert adapter.shard(*given) == given




class TinyLanguage(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.pre_process = Mock()


@pytest.mark.parametrize(
    "config",
    [
        Mock(context_parallel_size=1, sequence_parallel=False),
        SimpleNamespace(context_parallel_size=1, sequence_parallel=False),
    ],
    ids=["mock", "stock_fields"],
)
@pytest.mark.parametrize("further", [{}, Mock], ids=["stock_fields", "mock"])
def test_a_model_builds_on_configs_that_are_stand_ins(config: Any, further: Any) -> None:
    grid = SimpleNamespace(rank_offset=0, size=1, shape=[1], dim_names=["pp"])
    fields = {
        "language_model_spec": ModuleSpec(module=TinyLanguage, params={"config": config}),
        "modality_submodules_spec": {},
        "special_token_ids": {},
        "module_to_grid_map": {"language": grid},
        "kv_format": "sbhd",
    }
    model = MimoModel(SimpleNamespace(**fields) if further == {} else Mock(**fields))
    assert model.partition_adapter is None
    assert model.language_stages() == [model.language_model]


def test_an_optimizer_steps_stand_ins_without_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = MagicMock(is_stub_optimizer=False)
    inner.prepare_grads.return_value = False
    inner.get_grad_norm.return_value = 3.0
    inner.get_parameters.return_value = []
    inner.step_with_ready_grads.return_value = True
    inner.config.clip_grad = 1.0
    inner.count_zeros.return_value = 2
    infos = {"language": ModuleOptimizerInfo(inner, None, None, True)}

    # One rank has nobody to agree with.
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op=None: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    optimizer = MimoOptimizer(infos, OptimizerConfig(log_num_zeros_in_grad=True))
    assert optimizer.step() == (True, 3.0, 2)
