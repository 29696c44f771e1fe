"""What is known of devices: one table. An unknown device stays unknown; nothing is guessed from a similar name.

Figures are the vendors' data sheets: dense (no sparsity) bf16 and fp8 matrix FLOP/s, bytes of memory, bytes/s of memory
bandwidth, watts of board power.
"""

import re
from dataclasses import dataclass

TERA = 1e12
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    bf16_flops: float | None
    fp8_flops: float | None
    memory_bytes: float
    bandwidth_bytes_s: float
    power_w: float


TABLE = (
    Device("V100-SXM2-32GB", None, None, 32 * GIB, 0.9e12, 300),
    Device("A100-SXM4-40GB", 312 * TERA, None, 40 * GIB, 1.555e12, 400),
    Device("A100-SXM4-64GB", 312 * TERA, None, 64 * GIB, 1.64e12, 440),
    Device("A100-SXM4-80GB", 312 * TERA, None, 80 * GIB, 2.039e12, 400),
    Device("A100 80GB PCIe", 312 * TERA, None, 80 * GIB, 1.935e12, 300),
    Device("RTX A6000", 154.8 * TERA, None, 48 * GIB, 0.768e12, 300),
    Device("L40S", 362 * TERA, 733 * TERA, 48 * GIB, 0.864e12, 350),
    Device("RTX 4090", 165.2 * TERA, 330.3 * TERA, 24 * GIB, 1.008e12, 450),
    Device("H100 PCIe", 756 * TERA, 1513 * TERA, 80 * GIB, 2.0e12, 350),
    Device("H100 NVL", 835 * TERA, 1671 * TERA, 94 * GIB, 3.9e12, 400),
    Device("H100 80GB HBM3", 989 * TERA, 1979 * TERA, 80 * GIB, 3.35e12, 700),
    Device("GH200 120GB", 989 * TERA, 1979 * TERA, 96 * GIB, 4.0e12, 900),
    Device("H200", 989 * TERA, 1979 * TERA, 141e9, 4.8e12, 700),
    Device("B200", 2250 * TERA, 4500 * TERA, 180e9, 8.0e12, 1000),
    Device("MI250X", 383 * TERA, None, 128 * GIB, 3.2768e12, 560),
    Device("MI300X", 1307.4 * TERA, 2614.9 * TERA, 192 * GIB, 5.3e12, 750),
)


def find(name: str) -> Device | None:
    """The device whose table name is in `name` (as the driver reports it); the longest wins, None when there is none."""
    matches = [device for device in TABLE if re.search(rf"(?<!\w){re.escape(device.name)}(?!\w)", name, re.IGNORECASE)]
    return max(matches, key=lambda device: len(device.name), default=None)
