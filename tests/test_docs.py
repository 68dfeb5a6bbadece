"""Pages name what there is."""

import pathlib
import re

from dmd_jax.evals import protocols

PAGE = (pathlib.Path(__file__).parents[1] / "docs/evaluation.md").read_text()


def test_every_protocol_is_on_its_page():
    rows = [line.split("|")[1] for line in PAGE.split("\n") if line.startswith("| `")]
    named = set()
    for row in rows:
        first, *others = re.findall("`([^`]+)`", row)
        named |= {first, *(first + other for other in others)}
    assert named == protocols.PROTOCOLS.keys()
