# SPDX-License-Identifier: Apache-2.0
"""Every call that the installed stock MIMO and grid accept is accepted here."""

from __future__ import annotations

from tests.unit_tests.mimo.stock_interface import VERSION, definitions, differences

_MIMO = "megatron.core.models.mimo."
_BRIDGE = _MIMO + "comm.colocated_communicator."
_PAIRS = "stock's one autograd function knows no CP of the language model; comm.collectives does"
_STATE = (
    "stock moves three fields of the state of one kind of optimizer into objects of their own; "
    "training.optimizer_state does it for all kinds, under names that no layout changes"
)

_CONFIG = {
    _MIMO + "config.base_configs.MimoModelConfig.__init__": (
        "stock's default for language_model_spec raises: a ModuleSpec needs a module"
    ),
}

# Name -> the limit of stock that was removed, so that there is no such part.
EXCEPTIONS = {
    **_CONFIG,
    _BRIDGE + "ColocatedBridgeCommunicator._build_gather_groups": (
        "stock finds groups by (DP, TP) alone; BridgeLayout keeps CP ranks and stages apart"
    ),
    _BRIDGE + "_ColocatedCommunicate": _PAIRS,
    _BRIDGE + "_ColocatedCommunicate.forward": _PAIRS,
    _BRIDGE + "_ColocatedCommunicate.backward": _PAIRS,
    _BRIDGE + "_all_gather_along_batch_dim": _PAIRS,
    **{
        f"{_MIMO}optimizer.{name}": _STATE
        for name in (
            "_iter_optimizer_sub_dicts",
            "_extract_param_groups",
            "_extract_grad_scaler",
            "_extract_param_state_sharding_type",
            "_restore_param_groups",
            "_restore_param_state_sharding_type",
            "_restore_grad_scaler",
            "_get_replica_id",
        )
    },
}
if VERSION.startswith("0.16."):
    EXCEPTIONS = {
        **_CONFIG,
        _MIMO + "submodules.base.ModalitySubmodules.encode": (
            "0.19 calls the argument encoders_data_batch, and so does this project on both"
        ),
    }


def test_every_call_that_stock_accepts_is_accepted_here_or_named_with_its_reason() -> None:
    found = {name: differences(stock, ours) for name, stock, ours in definitions()}
    assert len(found) > (30 if VERSION.startswith("0.16.") else 120)
    assert {name: why for name, why in found.items() if why and name not in EXCEPTIONS} == {}
    # What is mended, or gone from stock, is no exception.
    assert {name for name in EXCEPTIONS if not found.get(name)} == set()


def test_what_the_comparison_must_notice() -> None:
    def stock(self, a, b=1, *rest, key=None, **more):
        """A method of stock's."""

    def same(self, a, b=1, *rest, key=None, own=2, **more):
        """A method of ours that accepts the same calls."""

    assert differences(stock, same) == []
    assert differences(stock, None)
    wrong = [
        lambda self, b=1, a=None, *rest, key=None, **more: None,
        lambda self, a, b=2, *rest, key=None, **more: None,
        lambda self, a, b, *rest, key=None, **more: None,
        lambda self, a, b=1, *rest, key, **more: None,
        lambda self, a, b=1, *rest, **more: None,
        lambda self, a, b=1, *, key=None, **more: None,
        lambda self, a, b=1, *rest, key=None: None,
        lambda self, a, b=1, *rest, key=None, own, **more: None,
        property(lambda self: None),
        staticmethod(stock),
    ]
    assert all(differences(stock, each) for each in wrong)
