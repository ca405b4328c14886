"""The floor of a case: the time an H100 needs at least.

The adapter weights are read once from cold HBM; x is read and y read and written once. Where x and y fit the L2 beside
everything else they are hot there (the layers around have just touched them). Measured on an H100 80GB HBM3 (132 SMs,
50 MB L2) by replaying CUDA graphs of plain copy kernels; one graph node is included. On other cards it is the same
yardstick, not their limit.
"""

from __future__ import annotations

from bisect import bisect_left

#: (MiB read by one kernel from cold HBM, us), a graph node included.
READ_COLD_US = (
    (0.125, 1.34),
    (0.5, 1.59),
    (1.0, 1.76),
    (2.0, 2.16),
    (4.0, 2.85),
    (8.0, 4.17),
    (16.0, 7.16),
    (32.0, 12.6),
    (64.0, 23.3),
    (256.0, 86.9),
)
#: us of an empty kernel as a graph node.
NODE_US = 0.95
#: us before the first byte of a kernel that streams.
STREAM_START_US = 1.2
#: Bytes a us: reading cold, reading and writing in place cold (both ways counted), x and y in the L2.
READ_RATE, UPDATE_RATE, HOT_RATE = 3.09e6, 2.85e6, 6.5e6
#: x and y up to this many bytes are hot.
HOT_BYTES = 30e6


def read_cold_us(nbytes: float) -> float:
    """us to read ``nbytes`` from cold HBM in one kernel: the table, interpolated.

    Below its smallest size that size's time, as a load's latency does not shrink; above its largest at the last rate.
    """
    mib = nbytes / 2**20
    if mib <= 0:
        return NODE_US
    if mib <= READ_COLD_US[0][0]:
        return READ_COLD_US[0][1]
    last_mib, last_us = READ_COLD_US[-1]
    if mib > last_mib:
        return last_us + (mib - last_mib) * 2**20 / READ_RATE
    i = bisect_left(READ_COLD_US, (mib, 0.0))
    (m0, t0), (m1, t1) = READ_COLD_US[i - 1], READ_COLD_US[i]
    return t0 + (mib - m0) / (m1 - m0) * (t1 - t0)


def floor_us(weight_bytes: float, xy_bytes: float, footprint: float) -> float:
    """The floor in us.

    Args:
        weight_bytes: of the adapters that occur, each once.
        xy_bytes: that move: x once and y twice.
        footprint: bytes that x and y take.
    """
    if footprint <= HOT_BYTES:
        return read_cold_us(weight_bytes) + xy_bytes / HOT_RATE
    return STREAM_START_US + weight_bytes / READ_RATE + xy_bytes / UPDATE_RATE
