"""The name of a GPU's architecture, as the launch tables and the gate have it."""

import functools

import torch


@functools.cache
def arch_of(device: torch.device) -> str:
    """Of a GPU: sm_90, gfx942; "" of another device, and where there is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
