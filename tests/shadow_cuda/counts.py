"What ran on the cards that are not there."
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    "What ran since the counts were cleared."
    kernels: Counter = field(default_factory=Counter)     # operations on a device, by name
    copies: Counter = field(default_factory=Counter)      # 'to device' and 'to host'
    syncs: Counter = field(default_factory=Counter)       # what makes the host wait for the device
    attention: Counter = field(default_factory=Counter)   # calls of attention by kernel and dtypes
    wide: Counter = field(default_factory=Counter)        # results in fp32 or bf16 of `limit` elements, by name
    wider: Counter = field(default_factory=Counter)       # those of more
    limit: int = 2**62

    def clear(self):
        for counter in (self.kernels, self.copies, self.syncs, self.attention, self.wide, self.wider): counter.clear()


counts = Counts()
