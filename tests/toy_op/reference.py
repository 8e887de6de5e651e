"""toy in torch."""

import torch

from kvfold.ops.toy.spec import Arguments


def run(arguments: Arguments) -> None:
    """Writes y."""
    torch.mul(arguments.x, arguments.factor, out=arguments.y)
