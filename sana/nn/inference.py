"""The same network, faster where nothing is learnt: a function Module -> Module for sampling and evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from sana.processor import fast_in_bf16

# torch multiplies fp32 matrices with MKL. oneDNN, which it uses for bf16 and for convolutions, is 5 to 20 % faster at
# the shapes of SANA on AMD processors (experiments/bench_sample); this operator of torch's compiler reaches it.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class InferenceLinear(nn.Linear):
    """`nn.Linear`, for CPUs where no derivative is taken: products in fp32 are oneDNN's, and those in bf16 are taken in
    fp32 and rounded where the processor is slower in bf16; else as it was."""

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        if (
            x.dtype != self.weight.dtype
            or x.dtype not in (torch.float32, torch.bfloat16)
            or not x.device.type == self.weight.device.type == "cpu"
            or torch.is_grad_enabled()
            or forward_ad._current_level >= 0
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        ):
            return F.linear(x, self.weight, self.bias)
        if x.dtype == torch.float32:
            return _product(x, self.weight, self.bias)
        if fast_in_bf16():
            return F.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.float()
        return _product(x.float(), self.weight.float(), bias).to(x.dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) if _ONEDNN is None else _ONEDNN(x, weight, bias, "none", [], "")


LINEAR: tuple[type[nn.Module], ...] = (nn.Linear, InferenceLinear)


def cast_products(part: nn.Module, kinds: tuple[type[nn.Module], ...], dtype: torch.dtype) -> None:
    """Cast layers of a part, in place, to the type that a surrounding autocast to `dtype` casts them to at every call:
    the numbers stay the same, the time and the memory of the casts are saved.

    Only for a part that uses them under that autocast and without gradients. Layers of another class keep what they
    are, as do weights of a type of their own (quantised ones).

    Args:
        part: such as the blocks of a network.
        kinds: exact classes of the layers that autocast covers; `LINEAR`, for instance.
        dtype: of the autocast.
    """
    for layer in part.modules():
        if type(layer) in kinds:
            for parameter in layer.parameters(recurse=False):
                if type(parameter.data) is Tensor and parameter.dtype == torch.float32:
                    parameter.data = parameter.data.to(dtype)


def cast_once(network: nn.Module, autoencoder: nn.Module | None) -> None:
    """Cast what drawing under autocast to bf16 would cast at every call: the products of the network's blocks and
    of the autoencoder's decoder; in place.

    Args:
        network: with `blocks`.
        autoencoder: None where it does not run under the autocast; one without a module `decoder` is left as it is.
    """
    blocks, decoder = network.get_submodule("blocks"), getattr(autoencoder, "decoder", None)
    cast_products(blocks, LINEAR, torch.bfloat16)
    if isinstance(decoder, nn.Module):
        cast_products(decoder, (nn.Conv2d,), torch.bfloat16)


def for_inference(network: nn.Module) -> nn.Module:
    """Replaces the linear layers of a network, in place, by `InferenceLinear` with the same parameters.

    The function stays the same up to rounding, as do the names in the state dict, training and every dtype and device.
    Only modules that are exactly `nn.Linear` are replaced: adapters and quantised layers keep what they are.
    """
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                layer = InferenceLinear(child.in_features, child.out_features, child.bias is not None, device="meta")
                layer.weight, layer.bias = child.weight, child.bias
                layer.train(child.training)
                setattr(parent, name, layer)
    return network
