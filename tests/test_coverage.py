"""Do intervals cover? A part of the simulation in 06c_power: films clustered by patient, known truth, bounds that allow for chance."""
from collections import Counter

import numpy as np
import pytest
from scipy.stats import binom, norm

from cxrlg.eval import bootstrap, delong, known_mean, percentile_interval

TRUE = dict(auc=norm.cdf(.5), change=norm.cdf(.6) - norm.cdf(.5))


def draw(rng, n_patients, prevalence, stop=.15):
    "Targets, scores of two models with AUC 0.691 and 0.726, patients of 1 to 20 films"
    pat = np.repeat(np.arange(n_patients), np.minimum(rng.geometric(stop, n_patients), 20))
    same, own, own2 = (rng.normal(size=(n_patients, len(prevalence)))[pat] for _ in range(3))
    n, film, film2 = rng.normal(size=(3, *same.shape))
    y = (.8 * same + .6 * n < norm.ppf(prevalence)).astype(float)
    return y, y + own + film, 1.2 * y + .8 * own + .6 * own2 + .8 * film + .6 * film2, pat


def shares(n_sim, n_patients, prevalence, n_boot=250):
    "How many of the simulated data sets' intervals hold the truth"
    rng, hits = np.random.default_rng(2), Counter()
    for i in range(n_sim):
        y, a, b, pat = draw(rng, n_patients, prevalence)
        for unit, c in (('patient', pat), ('film', np.arange(len(pat)))):
            x = known_mean(bootstrap(y, np.stack([a, b]), c, n_boot=n_boot, seed=i)[1:, :, 0], 2)
            found = {('bootstrap', 'auc'): percentile_interval(x[:, :1]), ('bootstrap', 'change'): percentile_interval(x[:, 1:] - x[:, :1])}
            one, two = delong(y[:, :1], a[:, :1], clusters=c), delong(y[:, :1], a[:, :1], b[:, :1], c)
            found |= {('delong', 'auc'): (one.low, one.high), ('delong', 'change'): (two.low, two.high)}
            for (how, what), (low, high) in found.items(): hits[f'{how} {unit} {what}'] += int(low.item() <= TRUE[what] <= high.item())
    return hits


def within(hits, n, low=.93, high=.97, error=.001):
    "Could so many hits come from a coverage between `low` and `high`?"
    return binom.ppf(error, n, low) <= hits <= binom.ppf(1 - error, n, high)


@pytest.fixture(scope='module')
def usual(): return shares(250, 150, [.3, .2, .15])


@pytest.mark.parametrize('name', ['bootstrap patient auc', 'bootstrap patient change', 'delong patient auc', 'delong patient change'])
def test_clustered_intervals_cover(usual, name): assert within(usual[name], 250), usual


@pytest.mark.parametrize('name', ['bootstrap film auc', 'bootstrap film change', 'delong film auc', 'delong film change'])
def test_intervals_that_take_films_as_independent_do_not(usual, name): assert usual[name] < binom.ppf(.001, 250, .93), usual


def test_delong_covers_for_a_rare_label_because_of_students_t():
    rng, n, hits = np.random.default_rng(3), 500, []
    while len(hits) < n:
        y, a, b, pat = draw(rng, 200, [.01], .3)
        if len(set(pat[y[:, 0] == 1])) < 2: continue
        both = [delong(y, a, clusters=pat, normal=normal) for normal in (False, True)]
        hits.append([t.low.item() <= TRUE['auc'] <= t.high.item() for t in both])
    student, normal = np.sum(hits, 0)
    assert within(student, n) and normal < binom.ppf(.001, n, .93), (student, normal)
