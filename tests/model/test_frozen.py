"""Frozen parts stay out of everything that is trained or saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sana.model.frozen import Frozen


def test_frozen_parts_are_not_registered() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(2, 2)
            self.frozen = Frozen(encoder=nn.Sequential(nn.Linear(2, 2), nn.Dropout()), absent=None)

    owner = Owner()
    assert set(owner.state_dict()) == {"own.weight", "own.bias"}
    assert len(list(owner.parameters())) == 2
    assert not owner.frozen.encoder.training
    assert not any(p.requires_grad for p in owner.frozen.encoder.parameters())
    owner.train()
    assert not owner.frozen.encoder.training
    assert "encoder" in owner.frozen
    assert "absent" not in owner.frozen
    assert list(owner.frozen) == ["encoder"]
    with pytest.raises(AttributeError, match=r"no frozen module 'teacher'; there are \['encoder'\]"):
        owner.frozen.teacher  # noqa: B018


def device_of(module: nn.Module) -> str:
    (found,) = {p.device.type for p in module.parameters()}
    return found


@pytest.mark.parametrize(("place", "rests", "works"), [("device", "meta", "meta"), ("cpu", "cpu", "cpu"),
                                                       ("offload", "cpu", "meta")])  # fmt: skip
def test_where_frozen_parts_rest_and_where_they_work(place: str, rests: str, works: str) -> None:
    """The device is torch's meta device: a tensor on it says where the work was done."""
    first, second = nn.Linear(3, 2), nn.Linear(2, 2)
    before = first.weight.detach().clone()
    frozen = Frozen(place, first=first, second=second).to("meta")  # type: ignore[arg-type]
    meta = torch.device("meta")
    assert device_of(first) == device_of(second) == rests
    with frozen.working("first", meta) as (module, where):
        assert module is first
        assert (device_of(first), device_of(second), where.type) == (works, rests, works)
        assert module(torch.ones(1, 3, device=where)).device.type == works
    assert device_of(first) == rests
    if rests == "cpu":
        assert torch.equal(first.weight, before)


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(ValueError, match="'device', 'cpu' or 'offload', got 'gpu'"):
        Frozen("gpu")  # type: ignore[arg-type]
