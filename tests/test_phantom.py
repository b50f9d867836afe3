"""The phantom: labels, patients, pictures, streams, faults and size."""
import hashlib
import tracemalloc

import numpy as np
import pandas as pd
import pytest

from cxrlg import phantom as ph
from cxrlg.phantom import FINDINGS, make_phantom


@pytest.fixture(scope='module')
def default(): return make_phantom(300, 64, 1)


@pytest.fixture(scope='module')
def many():
    "Labels of 30,000 patients, and the patient of each film"
    rng = np.random.default_rng(5)
    n = ph._films_per_patient(30_000, rng)
    return ph._sample_labels(n, ph._planted().to_numpy()[1:, 1:], rng), np.repeat(np.arange(len(n)), n)


def test_table_contract(default):
    table, pixels, truth = default
    assert list(table.columns) == ['image', 'patient', 'study', 'view', 'sex', 'age', *FINDINGS]
    assert isinstance(table.index, pd.RangeIndex) and table.attrs['labels'] == FINDINGS
    assert (table[FINDINGS].dtypes == 'float32').all() and set(np.unique(table[FINDINGS])) == {0., 1.}
    assert table.image.is_unique and (table.image.str[:6] == table.patient).all() and table.patient.nunique() == 300
    assert set(table.view) == {'PA', 'AP'} and set(table.sex) == {'M', 'F'} and table.age.between(18, 100).all()
    assert pixels.shape == (len(table), 64, 64) and pixels.dtype == np.uint8


def test_films_of_a_patient_are_1_to_20_and_share_sex(default):
    table = default[0]
    per = table.groupby('patient')
    assert per.size().between(1, 20).all() and (per.sex.nunique() == 1).all()
    assert (per.study.max() == per.size()).all() and (per.age.apply(lambda a: a.is_monotonic_increasing)).all()


def test_no_finding_excludes_all_but_devices(default):
    table = default[0]
    disease = table[FINDINGS[1:-1]].any(axis=1)
    assert ((table['No Finding'] == 1) == ~disease).all()
    assert (table['Support Devices'][table['No Finding'] == 1] == 1).any()


def test_truth_is_symmetric_sparse_and_signed():
    truth = ph._planted()
    A = truth.to_numpy()
    assert list(truth.index) == list(truth.columns) == FINDINGS
    assert (A == A.T).all() and (A.diagonal() == 0).all() and (A[0] == 0).all()
    assert 12 <= (np.triu(A) != 0).sum() <= 18 and (A < 0).any()


def test_prevalence_meets_its_targets_at_every_visit(many):
    y, who = many
    visit = np.arange(len(who)) - np.searchsorted(who, who)
    for rows in (visit == 0, (visit > 0) & (visit < 4), visit > 6):
        n = len(np.unique(who[rows]))
        tolerance = 5 * np.sqrt(ph._PREVALENCE * (1 - ph._PREVALENCE) / n)
        assert (abs(y[rows, 1:].mean(0) - ph._PREVALENCE) < tolerance).all()
    assert .01 <= y.mean(0).min() and y.mean(0).max() <= .40


@pytest.mark.parametrize('coupling', [0., .5, 1., 2.])
def test_biases_hold_the_prevalence_at_any_coupling(coupling):
    S = ph._states(13)
    _, p = ph._calibrate(ph._planted(coupling).to_numpy()[1:, 1:], ph._PREVALENCE, S)
    assert np.allclose(p@S, ph._PREVALENCE, atol=1e-9)


def test_first_films_follow_the_exact_distribution(many):
    "Pairwise frequencies of independent first films against the enumerated model"
    y, who = many
    first = y[np.r_[True, who[1:] != who[:-1]], 1:].astype(float)
    S = ph._states(13)
    _, p = ph._calibrate(ph._planted().to_numpy()[1:, 1:], ph._PREVALENCE, S)
    exact = (S * p[:, None]).T @ S
    error = abs(first.T @ first / len(first) - exact)
    assert (error < 5*np.sqrt(exact*(1 - exact)/len(first)) + 1e-9).all()


def test_every_planted_sign_is_in_the_labels(many):
    y = many[0][:, 1:].astype(float)
    J = ph._planted().to_numpy()[1:, 1:]
    partial = -np.linalg.inv(np.cov(y.T))
    assert (np.sign(partial[J != 0]) == np.sign(J[J != 0])).all()


def test_films_of_one_patient_resemble_each_other(many):
    y, who = many
    same = who[1:] == who[:-1]
    agree = (y[1:] == y[:-1]).mean(1)
    assert agree[same].mean() > agree[~same].mean() + .1 and agree[same].mean() < .99


def test_same_call_same_bytes_and_other_seed_other_bytes():
    sha = lambda seed: hashlib.sha256(make_phantom(20, 32, seed)[1].tobytes()).hexdigest()
    assert sha(3) == sha(3) != sha(4)


def test_pieces_do_not_change_the_films():
    rng = lambda: np.random.default_rng(0)
    films = pd.concat([ph._anatomy(np.ones(30, bool), rng()), ph._nuisance(np.zeros(30), rng())], axis=1)
    e, p = rng().random((30, 13), dtype='float32'), rng().random((30, 13, 4), dtype='float32')
    draw = lambda n: ph._draw_all(films, e, p, 32, rng(), pixels=n*32**2)
    assert (draw(1) == draw(7)).all() and (draw(7) == draw(30)).all()


def test_size_and_evidence_leave_the_labels_alone():
    one, small, _ = make_phantom(25, 32, 9)
    for kw in (dict(size=48), dict(size=32, evidence=.3)):
        other, pixels, _ = make_phantom(25, seed=9, **kw)
        pd.testing.assert_frame_equal(one, other)
    assert (pixels != small).any()


def test_geometry_is_the_same_at_every_size():
    "Films drawn at 128 px and averaged down agree with those drawn at 32 px"
    a, b = (make_phantom(30, n, 2)[1].astype(float) for n in (32, 128))
    b = b.reshape(len(b), 32, 4, 32, 4).mean((2, 4))
    r = [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b)]
    assert min(r) > .93


@pytest.mark.parametrize('size', [16, 33, 100, 256])
def test_any_size(size):
    table, pixels, _ = make_phantom(2, size, 0)
    assert pixels.shape == (len(table), size, size) and pixels.std() > 20


def test_without_evidence_the_films_do_not_know_the_labels():
    "evidence=0 draws the same films whatever the labels are"
    make = lambda c: make_phantom(40, 32, 6, evidence=0., coupling=c)
    (a, x, _), (b, y, _) = make(0.), make(1.)
    same = (a.view == b.view) & (a.sex == b.sex)
    assert (a[FINDINGS] != b[FINDINGS]).any(axis=None) and (x[same] == y[same]).all()


def test_each_finding_changes_the_film_and_more_of_it_more():
    rng = lambda: np.random.default_rng(1)
    film = pd.concat([ph._anatomy(np.array([True]), rng()), ph._nuisance(np.zeros(1), rng())], axis=1)
    place = rng().random((1, 13, 4), dtype='float32')
    draw = lambda e: ph._draw_all(film, e.astype('float32')[None], place, 64, rng())[0].astype(float)
    for j, name in enumerate(FINDINGS[1:]):
        weak, strong = (abs(draw(k*np.eye(13)[j]) - draw(np.zeros(13))).sum() for k in (.3, 1.))
        assert strong > weak > 100, name


def test_the_heart_is_on_the_left_of_the_patient(default):
    "More tissue on the right side of the picture at the height of the heart"
    lower = default[1][:, 34:42].astype(float).mean((0, 1))
    assert lower[36:48].mean() > lower[16:28].mean() + 5


@pytest.mark.parametrize('kw, number', [(dict(n_patients=0), 'n_patients=0'), (dict(n_patients=-3), 'n_patients=-3'),
                                        (dict(n_patients=2, size=15), 'size=15'), (dict(n_patients=2, evidence=-1.), 'evidence=-1')])
def test_faulty_arguments_are_named(kw, number):
    with pytest.raises(ValueError, match=number) as err: make_phantom(**kw)
    assert '\n' not in str(err.value)


def test_one_patient_and_memory():
    assert len(make_phantom(1, 32, 0)[0]) >= 1
    tracemalloc.start()
    try: pixels, peak = make_phantom(1500, 32, 0)[1], tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < pixels.nbytes + 100*2**20


def test_as_many_negatives_as_positives_are_hedged():
    table = make_phantom(2000, size=16)[0]
    hedged = ph.with_uncertain(table, .3, seed=1)
    y, unsure = table[FINDINGS[1:]], hedged[FINDINGS[1:]] == -1
    n_pos, n_neg = (unsure & (y == 1)).sum(), (unsure & (y == 0)).sum()
    assert (n_pos / (y == 1).sum()).to_numpy() == pytest.approx(.3, abs=.08)
    assert (abs(n_pos - n_neg) < 4 * np.sqrt(n_pos + n_neg) + 5).all()
    assert hedged.where(hedged != -1, table).equals(table) and hedged.attrs == table.attrs
    assert ph.with_uncertain(table, .3, seed=1).equals(hedged) and ph.with_uncertain(table, 0).equals(table)
