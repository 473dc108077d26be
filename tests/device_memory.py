"""What tinygrad's buffers take, whatever the tests before have left."""

import gc

from tinygrad.helpers import GlobalCounters


def device_bytes() -> int:
    """Bytes of all buffers in use. What nothing refers to any more is collected first: else it
    would be counted here and be gone, at some moment, in the count that this one is compared to."""
    gc.collect()
    return GlobalCounters.mem_used
