"""Lets a larger card answer as a T4 does: this folder on PYTHONPATH, in every process that is started then.

Compute capability 7.5 (so float16, no flash attention), and 14.7 GiB of memory in all. What it cannot do: the T4's
speed, and kernels that were compiled for it. Python imports `sitecustomize` by itself."""
import torch

MEMORY = int(14.7*2**30)   # of a T4 that no other process uses


class Properties:
    "The properties of a card, but for what a T4 has otherwise."
    total_memory, major, minor = MEMORY, 7, 5

    def __init__(self, real): self._real = real
    def __getattr__(self, name): return getattr(self._real, name)


def as_t4():
    "Patch torch; nothing happens without a card."
    if not torch.cuda.is_available(): return
    from torch.backends import cuda
    whole, properties = torch.cuda.mem_get_info()[1], torch.cuda.get_device_properties
    torch.cuda.get_device_properties = lambda device=None: Properties(properties(device))
    torch.cuda.get_device_capability = lambda device=None: (7, 5)
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: False
    torch.cuda.mem_get_info = lambda device=None: (MEMORY - torch.cuda.memory_reserved(device), MEMORY)
    for device in range(torch.cuda.device_count()):
        torch.cuda.set_per_process_memory_fraction(MEMORY/whole, device)
    # attention kernels that are not compiled for a T4
    cuda.enable_flash_sdp(False)
    cuda.enable_cudnn_sdp(False)


as_t4()
