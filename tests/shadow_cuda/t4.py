"Two T4s for a CPU build of torch: a device guard, and torch.cuda's answers. Import it before torch."
import ctypes
import importlib.util
import sys
from pathlib import Path
from unittest import mock

from shadow_cuda.guard import compiled

assert 'torch' not in sys.modules, 'import shadow_cuda.t4 before torch: it asks for its CUDA hooks once'

CAPABILITY = (7, 5)
MEMORY, FREE = 15_828_320_256, 15_500_000_000   # bytes that a T4 has, and that are free on a fresh one

_torch = Path(importlib.util.find_spec('torch').origin).parent
_library = ctypes.CDLL(str(compiled(_torch)), ctypes.RTLD_GLOBAL)
import torch  # noqa: E402

_library.install()
# these look at the device when they are imported: before torch.cuda says that there is one;
# nothing is compiled, and the compiler takes seconds to be loaded
with mock.patch.object(torch, 'compile', lambda function=None, **settings: function or (lambda f: f)):
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401


class Properties:
    name, major, minor, total_memory, multi_processor_count = 'Tesla T4', *CAPABILITY, MEMORY, 40


current = [0]          # the device that torch.cuda.set_device chose
set_device_calls = []


def _set_device(device):
    index = torch.device(device).index if not isinstance(device, int) else device
    current[0] = index or 0
    set_device_calls.append(current[0])


_ANSWERS = dict(
    is_available=lambda: True,
    is_initialized=lambda: True,
    device_count=lambda: 2,
    current_device=lambda: current[0],
    set_device=_set_device,
    get_device_name=lambda device=None: Properties.name,
    get_device_capability=lambda device=None: CAPABILITY,
    get_device_properties=lambda device=None: Properties,
    mem_get_info=lambda device=None: (FREE, MEMORY),
    memory_reserved=lambda device=None: 0,
    memory_allocated=lambda device=None: 0,
    max_memory_allocated=lambda device=None: 0,
    reset_peak_memory_stats=lambda device=None: None,
    empty_cache=lambda: None,
    synchronize=lambda device=None: None,
    get_rng_state=lambda device=None: torch.get_rng_state(),
    set_rng_state=lambda state, device=None: None,
    manual_seed=lambda seed: None,
    manual_seed_all=lambda seed: None,
)
for name, answer in _ANSWERS.items(): setattr(torch.cuda, name, answer)
