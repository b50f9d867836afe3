"Recalibration: prevalence against what was drawn."
import numpy as np
import pytest
from scipy.special import expit

from cxrlg.core import DataError
from cxrlg.recalibration import em_prevalence, shift_prevalence


def test_prevalence_is_found_without_labels():
    rng = np.random.default_rng(0)
    def draw(share, n):
        y = rng.random(n) < share
        return y, rng.normal(size=n) + 2 * y
    def logits(x, share): return 2 * x - 2 + np.log(share / (1 - share))
    y, x = draw(.4, 20000)
    p = expit(logits(x, .1))[:, None]
    assert em_prevalence(p, np.array([.1])) == pytest.approx(.4, abs=.02)
    assert shift_prevalence(p, np.array([.1]), np.array([.4]))[:, 0] == pytest.approx(expit(logits(x, .4)), abs=1e-6)


def test_no_positive_at_all_leaves_a_small_prevalence():
    assert 0 < em_prevalence(np.full((50, 1), 1e-6), np.array([.3])).item() < .02


def test_what_is_no_probability_or_share_is_refused():
    p = np.full((5, 2), .3)
    for call, text in ((lambda: em_prevalence(p * 9 - 4, [.1, .2]), 'through the sigmoid first'),
                       (lambda: shift_prevalence(p * np.nan, .1, .2), 'through the sigmoid first'),
                       (lambda: em_prevalence(p, [.1, 20]), 'each lies between 0 and 1'),
                       (lambda: em_prevalence(p, [.1, .2, .3]), '3 shares for 2 labels')):
        with pytest.raises(DataError, match=text): call()
