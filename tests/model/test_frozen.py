"""Frozen parts stay out of everything that is trained or saved."""

from __future__ import annotations

import pytest
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
