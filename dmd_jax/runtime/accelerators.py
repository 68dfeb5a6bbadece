"""Accelerators in published numbers: memory, operations and bytes in a second.

Sources: the pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" of
https://docs.cloud.google.com/tpu/docs; NVIDIA's data sheets of A100, H100 and H200, dense bfloat16.
Both makers state the bandwidth of links as the sum of both directions; `links` is one direction.
"""

import dataclasses

GB = 1e9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: as in the names of machines, such as v5e-64.
      kinds: jax's `device_kind`, in all its spellings.
      memory: bytes that the maker states; the compiler leaves a little less of them.
      flops: bfloat16 operations in a second.
      bandwidth: bytes of memory that it reads or writes in a second.
      links: bytes that it sends to other chips in a second, over all its links.
    """

    name: str
    kinds: tuple[str, ...]
    memory: float
    flops: float
    bandwidth: float
    links: float


CHIPS = {
    chip.name: chip
    for chip in (
        # links: 2400 Gbit/s
        Chip("v4", ("TPU v4",), 32 * GIB, 275e12, 1228 * GB, 300 * GB),
        # links: 1600 Gbit/s; 400 GB/s in both directions
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 16 * GIB, 197e12, 819 * GB, 200 * GB),
        # links: 4800 Gbit/s; 1200 GB/s in both directions
        Chip("v5p", ("TPU v5", "TPU v5p"), 95 * GIB, 459e12, 2765 * GB, 600 * GB),
        # Older versions of the page have 819 and 1640 GB/s, 1600 and 3584 Gbit/s; the newest has
        # 1600 GB/s, and 800 GB/s in both directions.
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 32 * GIB, 918e12, 1640 * GB, 448 * GB),
        # NVLink: 600 GB/s in both directions
        Chip("a100", ("NVIDIA A100-SXM4-80GB",), 80 * GIB, 312e12, 2039 * GB, 300 * GB),
        # SXM; NVLink: 900 GB/s in both directions
        Chip("h100", ("NVIDIA H100 80GB HBM3",), 80 * GIB, 989e12, 3350 * GB, 450 * GB),
        Chip("h200", ("NVIDIA H200",), 141 * GB, 989e12, 4800 * GB, 450 * GB),
    )
}


def of(device_kind: str) -> Chip | None:
    """Returns the chip that jax calls `device_kind`; None if it is none of `CHIPS`."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)
