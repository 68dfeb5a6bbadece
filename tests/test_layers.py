import pytest

from dmd_jax.models import layers

PARAMS = {"enc": {"conv": {"kernel": 0, "bias": 0}, "norm": {"scale": 0}}, "out": {"kernel": 0}}


def test_first_match_wins():
    assigned = layers.assign(
        ((r"norm", "n"), (r"^out\.", "o"), (r"kernel$", "k"), (r"", "rest")), PARAMS
    )
    assert assigned == {
        "enc": {"conv": {"kernel": "k", "bias": "rest"}, "norm": {"scale": "n"}},
        "out": {"kernel": "o"},
    }


def test_parameters_that_no_rule_matches_are_listed():
    with pytest.raises(
        ValueError, match=r"no rule matches: \['enc\.conv\.bias', 'enc\.norm\.scale'\]"
    ):
        layers.assign(((r"kernel$", 1),), PARAMS)


def test_rules_that_match_nothing_are_listed():
    with pytest.raises(ValueError, match=r"match no parameter: \['decoder', 'lora'\]"):
        layers.assign(((r"decoder", 1), (r"", 2), (r"lora", 3)), PARAMS)


def test_a_rule_in_the_shadow_of_another_is_no_error():
    assert layers.assign(((r"", 1), (r"kernel$", 2)), PARAMS)["out"] == {"kernel": 1}
