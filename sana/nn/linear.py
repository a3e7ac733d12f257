"""Where the linear layers of a network come from.

Every part takes a `linear` factory, called as ``linear(in_features, out_features, bias=...)``, and builds all its
matrices with it. Adapters and quantised copies therefore reach every weight by one name.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

Linear = Callable[..., nn.Module]
"""``linear(in_features: int, out_features: int, bias: bool = True) -> Module``: (..., in) -> (..., out)."""
