"""The device that a part of a step is on."""

import contextlib

import torch


def resolve_device(device: torch.device | str | int) -> torch.device:
    """A CUDA device with its index, the current one if it has none, or the CPU.

    Raises:
        ValueError: another kind of device.
    """
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"device is {str(device)!r}; accepted: a CUDA device or 'cpu'")
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a CUDA device torch's current one; does nothing for the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
