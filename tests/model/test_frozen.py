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


@pytest.mark.parametrize("place", ["device", "cpu", "offload"])
def test_where_frozen_parts_rest_and_where_they_work(place: str) -> None:
    first, second = nn.Linear(3, 2), nn.Linear(2, 2)
    before, home = first.weight.detach().clone(), first.weight.data_ptr()
    frozen = Frozen(place, first=first, second=second).to("cpu")  # type: ignore[arg-type]
    assert (frozen.offload is None) == (place == "device")
    fetched: list[torch.Tensor] = []
    if frozen.offload is not None:
        frozen.offload._fetch = lambda tensor: fetched.append(tensor) or tensor.clone()  # as to another device
    with frozen.working("first", torch.device("cpu")) as (module, where):
        assert module is first
        assert where.type == "cpu"
        assert (first.weight.data_ptr() != home) == (place == "offload")
        assert torch.equal(module(torch.ones(1, 3)), torch.nn.functional.linear(torch.ones(1, 3), before, first.bias))
    assert len(fetched) == (2 if place == "offload" else 0), "its weight and bias, and nothing of the other part"
    assert first.weight.data_ptr() == home


def test_parts_on_the_cpu_do_not_follow_to_the_device() -> None:
    frozen = Frozen("cpu", part=nn.Linear(2, 2)).to("meta")
    with frozen.working("part", torch.device("meta")) as (module, where):
        assert (module.weight.device.type, where.type) == ("cpu", "cpu")
    assert Frozen("device", part=nn.Linear(2, 2)).to("meta").part.weight.device.type == "meta"


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(ValueError, match="'device', 'cpu' or 'offload', got 'gpu'"):
        Frozen("gpu")  # type: ignore[arg-type]
