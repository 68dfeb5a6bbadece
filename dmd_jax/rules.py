"""Rules by name: ordered (regex, value) lists over the paths of parameters, such as `enc.8x8_block0.conv1.kernel`. First match wins."""

import re
from typing import Any

from flax import traverse_util


def assign(rules: tuple[tuple[str, Any], ...], params: dict) -> dict:
    """The tree of `params` with the value of the first rule whose regex is found in each leaf's path.

    Raises:
      ValueError: a parameter that no rule matches, or a rule that matches no parameter.
    """
    paths = traverse_util.flatten_dict(params, sep=".")
    matches = {path: [value for regex, value in rules if re.search(regex, path)] for path in paths}
    unmatched = [path for path, values in matches.items() if not values]
    idle = [regex for regex, _ in rules if not any(re.search(regex, path) for path in paths)]
    if unmatched or idle:
        raise ValueError(f"parameters that no rule matches: {unmatched}; rules that match no parameter: {idle}.")
    return traverse_util.unflatten_dict({path: values[0] for path, values in matches.items()}, sep=".")
