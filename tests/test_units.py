"Several films as one case: means by hand, names that stay apart, and everything else of a study unchanged."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cxrlg.core import DataError
from cxrlg.predictions import read_predictions
from cxrlg.results import example_study, read_study
from cxrlg.tables import summarise
from cxrlg.units import as_judged, by_unit, case_table, keep_views, units_of


@pytest.fixture(scope='module')
def films():
    "A hundred films of forty patients, up to three studies each, in an order of its own"
    rng = np.random.default_rng(0)
    patient = rng.integers(40, size=100)
    table = pd.DataFrame(dict(image=[f'{i}.png' for i in range(100)], patient=patient.astype(str)))
    return table.assign(study=rng.integers(3, size=100).astype(str), view=rng.choice(['PA', 'AP', 'L', None], 100)), rng.random((2, 100, 3))


def test_the_mean_is_within_a_view_then_over_views(films):
    table, p = films
    units = units_of(table, 'study')
    by_hand = {}
    for (patient, study), g in table.groupby(['patient', 'study']):
        views = [p[:, v.index].mean(1) for _, v in g.groupby(g.view.fillna('?'))]
        by_hand[f'{patient}/{study}'] = np.mean(views, 0)
    found = units.mean(p)
    assert set(units.films.image) == set(by_hand)
    for k, name in enumerate(units.films.image): assert found[:, k] == pytest.approx(by_hand[name])


def test_films_are_cases_of_their_own(films):
    table, p = films
    units = units_of(table, 'film')
    assert units.mean(p) == pytest.approx(p) and units.films.image.tolist() == table.image.tolist()


def test_a_study_name_of_one_patient_stays_as_it_is():
    table = pd.DataFrame(dict(image=['a', 'b'], patient=['1', '2'], study=['s1', 's2']))
    assert units_of(table, 'study').films.image.tolist() == ['s1', 's2']


@pytest.mark.parametrize('unit, views, says', [
    ('visit', None, "no unit 'visit'"),
    ('study', ['Pa'], "no view 'Pa'; did you mean 'PA'"),
])
def test_units_and_views_that_are_not_there(films, unit, views, says):
    with pytest.raises(DataError, match=says): units_of(films[0], unit, views)


def test_a_blank_study_and_a_missing_column_are_refused(films):
    table = films[0]
    with pytest.raises(DataError, match='1 films have no study .0.png.'):
        units_of(table.assign(study=table.study.mask(table.index == 0)), 'study')
    with pytest.raises(DataError, match='nothing says the view'): units_of(table.drop(columns='view'), 'study', ['PA'])


@pytest.fixture(scope='module')
def study(tmp_path_factory): return read_study(example_study(tmp_path_factory.mktemp('runs')/'demo', 150, locked=.2))


def test_a_trained_study_by_patient_has_all_tables_and_kinds(study):
    people = by_unit(study, 'patient', path='elsewhere')
    assert people.kinds == study.kinds and people.path.name == 'elsewhere' and people.config['unit'] == 'patient'
    tables = summarise(people, n_boot=10)
    assert tables['flow'].set_index('part').films['evaluated'] == study.films(study.folds).patient.nunique()
    assert len(tables['locked']) and len(tables['arms']) == 2


def test_film_without_views_changes_nothing(study): assert by_unit(study) is study


def test_views_leave_films_out(study):
    some = by_unit(study, 'film', ['PA'])
    assert set(some.films(some.folds).view) == {'PA'} and 'of the views PA' in some.notes[-1]
    pa = study.films(study.folds).view == 'PA'
    assert some.probs('none', some.grid('none')) == pytest.approx(study.probs('none', study.grid('none'))[:, pa], abs=1e-6)


def test_conflicts_are_counted():
    table = pd.DataFrame(dict(image=list('abcdef'), patient=list('112233'), study=list('xxyyzz'), Edema=[.1, .2, .8, .9, .4, .6]))
    labels = pd.DataFrame(dict(image=list('abcdef'), Edema=[0, 1, 1, 1, 0, 0]))
    found = by_unit(read_predictions(table, labels, n_splits=1, verbose=False), 'study')
    assert found.targets((0,)).Edema.tolist() == [1, 1, 0] and '1 cases have films that are labelled otherwise' in found.notes


def test_predictions_by_case_leave_unreadable_films_out_and_name_what_a_list_lacks():
    table = pd.DataFrame(dict(file=['x/a.png', 'x/b.png', 'x/c.dcm'], A=[.2, np.nan, .6], B=[.1, np.nan, .3]))
    listed = pd.DataFrame(dict(film=list('abcd'), patient=list('1112'), study=list('sstu'), view=['PA', 'L', 'PA', 'PA']))
    by_patient = case_table(table, ['A', 'B'], listed, 'patient')
    assert by_patient.case.tolist() == ['1'] and by_patient.n_films.tolist() == [2] and by_patient.A[0] == pytest.approx(.4)
    with pytest.raises(DataError, match='lacks 1 films that are to be predicted .x/a.png.'): case_table(table, ['A', 'B'], listed[1:])
    with pytest.raises(DataError, match='no film could be read'): case_table(table.assign(A=np.nan), ['A', 'B'], listed)
    with pytest.raises(DataError, match='no column for the patient'): case_table(table, ['A', 'B'], listed.drop(columns='patient'))


def with_unit(study, *units):
    "The study as if its folds named these units, in turn"
    cells = {k: c | dict(config=c['config'] | dict(unit=units[i % len(units)])) for i, (k, c) in enumerate(study.cells.items())}
    return replace(study, cells=cells)


def test_a_study_is_judged_by_the_unit_that_it_names(study):
    assert as_judged(study) is study and as_judged(with_unit(study, 'film')).films(study.folds).equals(study.films(study.folds))
    people, by_hand = as_judged(with_unit(study, 'patient')), by_unit(study, 'patient')
    grid = people.grid('none')
    assert (people.probs('none', grid) == by_hand.probs('none', grid)).all() and people.targets(grid[1]).equals(by_hand.targets(grid[1]))
    assert (people.locked_probs('none', grid) == by_hand.locked_probs('none', grid)).all()
    assert people.config['unit'] == 'patient' and 'film by film' in people.notes[-1]


def test_folds_of_two_units_are_refused(study):
    two = with_unit(study, 'film', 'patient')
    with pytest.raises(DataError, match='name the units film, patient: run cxrlg_study again'): as_judged(two)


def test_a_study_of_some_views_keeps_saying_so(study):
    cells = {k: c | dict(config=c['config'] | dict(unit='patient', views=['PA'])) for k, c in study.cells.items()}
    assert as_judged(replace(study, cells=cells)).config['views'] == ['PA']


def test_views_are_kept_in_order_and_counted(films):
    table = films[0].copy()
    table.attrs = dict(labels=['Edema'], left_out=2)
    kept = keep_views(table, ['PA', 'AP'])
    assert kept.image.tolist() == table.image[table.view.isin(['PA', 'AP'])].tolist() and kept.index.tolist() == list(range(len(kept)))
    assert kept.attrs == dict(labels=['Edema'], left_out=2, other_views=len(table) - len(kept)) and keep_views(table, []) is table


def test_spellings_of_a_study_or_a_view_make_no_other_one():
    table = pd.DataFrame(dict(image=list('abcd'), patient=['p'] * 4, study=['s1', 's1 ', ' s1', 's1'], view=['PA', 'PA ', 'L', 'PA']))
    clean = table.assign(study='s1', view=table['view'].str.strip())
    p = np.arange(4.)[:, None]
    assert units_of(table).mean(p) == pytest.approx(units_of(clean).mean(p)) and len(units_of(table).films) == 1
    numbers = table.assign(study=[1, 1.0, '1', '1.0'], view=[1, 2, 1, None])
    assert len(units_of(numbers).films) == 1 and units_of(numbers, 'patient', ['1']).films.n_films.tolist() == [2]
    assert units_of(numbers, 'patient', [2]).films.n_films.tolist() == [1]
    for unknown in (None, np.nan): assert len(units_of(table.assign(view=unknown)).films) == 1


def test_a_list_of_films_with_blanks_in_it():
    table = pd.DataFrame(dict(file=['x/a.png', 'x/b.png', 'x/c.png'], A=[.2, .4, .9]))
    listed = pd.DataFrame(dict(film=list('abc'), patient='1', study=['s', 's ', 's'], view=['PA', 'PA ', 'L']))
    cases = case_table(table, ['A'], listed)
    assert cases.case.tolist() == ['s'] and cases.A[0] == pytest.approx(.6)
