"""Importing this module registers every op of kvfold as torch.ops.kvfold.<op>."""

from kvfold.runtime.torch_op import register_all

register_all()
