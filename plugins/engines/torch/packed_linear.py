"""Linear layers whose weight is kept in oneDNN's own order, which makes decoding on the CPU in bfloat16 faster.

The operations are private to torch, so `packing_works` tries them once at load; without them nothing is packed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trtserve.plugins.engines.torch.huge_pages import onto_huge_pages

_ROWS_HINT = 32  # the batch that a packing is tuned for; one packing serves all batch sizes


class Linear(nn.Module):
    """x @ weight.T + bias. A packed one owns a copy of the weight, so the original can go."""

    def __init__(self, weight: Tensor, bias: Tensor | None, packed: bool) -> None:
        """weight: [outputs, inputs], with `packed` in bfloat16 on the CPU; bias: [outputs] or None."""
        super().__init__()
        self._bias = bias
        self._packed = packed
        self._weight = _pack(weight) if packed else weight
        if packed:
            # kept, since finding an operation by its name costs a decode step as much as a small one
            self._pointwise = torch.ops.mkldnn._linear_pointwise.default
            self._pointwise_with = torch.ops.mkldnn._linear_pointwise.binary

    def forward(self, x: Tensor) -> Tensor:
        if self._packed:
            product: Tensor = self._pointwise(x, self._weight, self._bias, "none", [], "")
            return product
        return F.linear(x, self._weight, self._bias)

    def silu(self, x: Tensor) -> Tensor:
        """silu of the product; a packed linear takes it before it rounds."""
        if self._packed:
            activated: Tensor = self._pointwise(x, self._weight, self._bias, "swish", [], "")
            return activated
        return F.silu(self.forward(x))

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """The product, times `factor` of its shape; a packed linear multiplies before it rounds."""
        if self._packed:
            result: Tensor = self._pointwise_with(x, factor, self._weight, self._bias, "mul")
            return result
        return self.forward(x) * factor

    def plus(self, x: Tensor, term: Tensor) -> Tensor:
        """The product, plus `term` of its shape; a packed linear adds before it rounds."""
        if self._packed:
            result: Tensor = self._pointwise_with(x, term, self._weight, self._bias, "add")
            return result
        return self.forward(x) + term


def packing_works(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch on this machine packs linears of this kind and computes the same with them."""
    if dtype is not torch.bfloat16 or device.type != "cpu":
        return False
    generator = torch.Generator().manual_seed(0)
    shapes = ((96, 64), (96,), (3, 64), (3, 96))
    weight, bias, x, other = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    try:
        got = _all_forms(Linear(weight, bias, packed=True), x, other)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(got, _all_forms(Linear(weight, bias, packed=False), x, other), rtol=0.02, atol=0.1)


def pack_linears(module: nn.Module) -> int:
    """Replace every plain `nn.Linear` inside, in place; returns how many. A tied embedding keeps its own weight."""
    packed = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                bias = None if child.bias is None else child.bias.detach()
                setattr(parent, name, Linear(child.weight.detach(), bias, packed=True))
                packed += 1
    return packed


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS_HINT)
    # a step reads all weights once: with pages of 4 KiB finding them takes a tenth of the linears' time
    onto_huge_pages(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))
    return packed


def _all_forms(linear: Linear, x: Tensor, other: Tensor) -> Tensor:
    return torch.stack([linear(x), linear.silu(x), linear.times(x, other), linear.plus(x, other)])
