"""Accelerators in published numbers: what their memory holds, what they compute and move in a second.

Sources: the pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" of https://docs.cloud.google.com/tpu/docs; NVIDIA's data sheets of A100,
H100 and H200, dense bfloat16. Both makers state the links of a chip as the sum of both directions; `links` is one of them.
"""

import dataclasses

GB, GIB = 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: in the names of machines, such as v5e-64.
      kinds: jax's `device_kind`, in all its spellings.
      memory: bytes that the maker states; what the compiler leaves of them is a little less.
      flops: bfloat16 operations in a second.
      bandwidth: bytes of memory read or written in a second.
      links: bytes that it can send to other chips in a second, over all its links.
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
        Chip("v4", ("TPU v4",), 32 * GIB, 275e12, 1228 * GB, 300 * GB),  # 2400 Gbit/s
        Chip(
            "v5e", ("TPU v5 lite", "TPU v5e"), 16 * GIB, 197e12, 819 * GB, 200 * GB
        ),  # 1600 Gbit/s; both directions: 400 GB/s
        Chip(
            "v5p", ("TPU v5", "TPU v5p"), 95 * GIB, 459e12, 2765 * GB, 600 * GB
        ),  # 4800 Gbit/s; both directions: 1200 GB/s
        # 819 and 1640 GB/s, 1600 and 3584 Gbit/s in older versions of the page; now 1600 GB/s, and 800 GB/s in both directions.
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 32 * GIB, 918e12, 1640 * GB, 448 * GB),
        Chip(
            "a100", ("NVIDIA A100-SXM4-80GB",), 80 * GIB, 312e12, 2039 * GB, 300 * GB
        ),  # NVLink, both directions: 600 GB/s
        Chip(
            "h100", ("NVIDIA H100 80GB HBM3",), 80 * GIB, 989e12, 3350 * GB, 450 * GB
        ),  # SXM; NVLink, both directions: 900 GB/s
        Chip("h200", ("NVIDIA H200",), 141 * GB, 989e12, 4800 * GB, 450 * GB),
    )
}


def of(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`; None if it is none of `CHIPS`."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)
