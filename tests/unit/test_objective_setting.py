import math

import pytest

from blip2train.errors import ConfigError
from blip2train.objective.contrastive import ContrastiveObjective
from blip2train.objective.grounded_generation import GroundedGenerationObjective
from blip2train.objective.language_modeling import LanguageModelingObjective
from blip2train.objective.matching import MatchingObjective


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_no_weight_is_refused_by_name(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"objectives\.itc\.weight"):
        ContrastiveObjective(weight=weight)
    with pytest.raises(ConfigError, match=r"objectives\.itm\.weight"):
        MatchingObjective(weight=weight)
    with pytest.raises(ConfigError, match=r"objectives\.itg\.weight"):
        GroundedGenerationObjective(dec_id=4, weight=weight)


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_smoothing_outside_of_zero_to_one_is_refused_by_name(share: float) -> None:
    with pytest.raises(ConfigError, match=r"objectives\.itc\.label_smoothing"):
        ContrastiveObjective(label_smoothing=share)
    with pytest.raises(ConfigError, match=r"objectives\.itg\.label_smoothing"):
        GroundedGenerationObjective(dec_id=4, label_smoothing=share)
    with pytest.raises(ConfigError, match=r"stage\.objective\.label_smoothing"):
        LanguageModelingObjective(label_smoothing=share)


def test_a_weight_of_zero_is_allowed_and_means_off() -> None:
    assert ContrastiveObjective(weight=0.0).weight == 0.0
