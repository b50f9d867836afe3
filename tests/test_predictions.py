"""Predictions as they are met become one study; what is wrong is one line that names the file, the film and what helps."""
import gzip
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

from conftest import ROOT
from cxrlg.core import DataError
from cxrlg.data import CHEXPERT
from cxrlg.eval import auc_interval, macro_auc, paired_bootstrap, simulate
from cxrlg.predictions import XRV, read_predictions
from cxrlg.tables import summarise
from cxrlg.units import by_unit

LABELS = ['Edema', 'Pleural Effusion', 'Lung Lesion']


@pytest.fixture(scope='module')
def films():
    "Labels, and probabilities of two models"
    y, z, patients = simulate(150, [.3, .2, .1], [1.5, 1.2, 1.8], seed=3)
    people = dict(image=[f'images/f{i:03d}.png' for i in range(len(y))], patient=[f'{p:03d}' for p in patients])
    labels = pd.DataFrame(people | dict(sex=np.where(patients % 2, 'F', 'M'), fold=patients % 3)).join(pd.DataFrame(y, columns=LABELS))
    rng = np.random.default_rng(1)
    scores = [labels[['image']].join(pd.DataFrame(expit(z + k * rng.normal(size=z.shape)).round(6), columns=LABELS)) for k in (0, .5)]
    return labels, scores[0], scores[1]


def read(files, labels=None, **options): return read_predictions(files, labels, verbose=False, **options)


def probs(study, arm=None):
    arm = arm or study.reference
    return study.probs(arm, study.grid(arm))


def expected(scores): return scores.sort_values('image')[LABELS].to_numpy()


def same(study, scores):
    "The study's probabilities are those of the table, film by film"
    p, order = probs(study)[0], study.films(study.folds).row.to_numpy()
    np.testing.assert_allclose(p[np.argsort(order)], expected(scores), rtol=1e-12)


def refused(match, files, labels=None, **options):
    with pytest.raises(DataError, match=match) as e: read(files, labels, **options)
    assert '\n' not in str(e.value)


# ---- formats

def test_tables_are_those_of_the_statistics_called_by_hand(films):
    labels, a, b = films
    study = read(dict(old=a, new=b), labels)
    t = summarise(study, 100)
    y, ordered = labels.sort_values('image')[LABELS], labels.sort_values('image')
    by_fold = np.argsort(ordered.fold.to_numpy(), kind='stable')
    rows = [x.iloc[by_fold].reset_index(drop=True) for x in (ordered, y, a.sort_values('image')[LABELS], b.sort_values('image')[LABELS])]
    one = auc_interval(rows[1], rows[2], rows[0].patient, rows[0].fold, n_boot=100).loc['macro']
    pair = paired_bootstrap(rows[1], rows[2], rows[3], rows[0].patient, rows[0].fold, n_boot=100).loc['macro']
    arms = t['arms'].set_index('arm')
    assert list(arms.index) == ['old', 'new'] and study.reference == 'old'
    np.testing.assert_allclose(arms.loc["old", ["mean", "low", "high"]].astype(float), one[["auc", "low", "high"]].astype(float),
                               rtol=1e-12)
    np.testing.assert_allclose(arms.loc['new', ['change', 'change_low', 'change_high']].astype(float),
                               pair[['change', 'low', 'high']].astype(float), rtol=1e-12)


SHAPES = {
    'rows and columns in another order': lambda t: t.sample(frac=1, random_state=0)[[*t.columns[::-1]]],
    'films without folder and ending': lambda t: t.assign(image=t.image.str.replace('images/', '').str.removesuffix('.png')),
    'films with a backslash': lambda t: t.assign(image='.\\' + t.image.str.replace('/', '\\')),
    'other names of findings': lambda t: t.rename(columns={'Pleural Effusion': 'effusion', 'Lung Lesion': 'lung_lesion'}),
    'a tag before': lambda t: t.rename(columns={l: f'prob_{l}' for l in LABELS}),
    'a tag behind': lambda t: t.rename(columns={l: f'{l}_pred' for l in LABELS}),
    'another name of the film': lambda t: t.rename(columns=dict(image='Image_name')),
    'logits': lambda t: t.assign(**{l: logit(t[l]) for l in LABELS}),
    'long': lambda t: t.melt('image', LABELS, 'finding', 'probability'),
    'long, findings as classes': lambda t: t.melt('image', LABELS, 'class_name', 'score').rename(columns=dict(image='image_id')),
    'a column of row numbers': lambda t: t.rename_axis('Unnamed: 0').reset_index(),
}


@pytest.mark.parametrize('shape', SHAPES)
def test_shapes_of_predictions(films, tmp_path, shape):
    labels, a, _ = films
    SHAPES[shape](a).to_csv(tmp_path/'p.csv', index=False)
    same(read(tmp_path/'p.csv', labels), a)


WRITTEN = {
    'semicolons and decimal commas': dict(sep=';', decimal=','),
    'tabs': dict(sep='\t'),
    'with a byte order mark': dict(encoding='utf-8-sig'),
}


@pytest.mark.parametrize('how', WRITTEN)
def test_dialects_of_csv(films, tmp_path, how):
    labels, a, _ = films
    a.to_csv(tmp_path/'p.csv', index=False, **WRITTEN[how])
    same(read(tmp_path/'p.csv', labels), a)


def test_packed_and_parquet(films, tmp_path):
    labels, a, _ = films
    with gzip.open(tmp_path/'p.csv.gz', 'wt') as f: a.to_csv(f, index=False)
    a.to_parquet(tmp_path/'q.parquet')
    labels.to_csv(tmp_path/'labels.csv', index=False)
    for name in ('p.csv.gz', 'q.parquet'): same(read(tmp_path/name, tmp_path/'labels.csv'), a)


@pytest.mark.parametrize(
    'as_written',
    [
        lambda v: v.map({1: 'True', 0: 'False'}),
        lambda v: v.map({1: '1.0', 0: '0.0'}),
        lambda v: v.astype(bool),
        lambda v: v.astype('Int64'),
    ],
)
def test_labels_as_they_are_written(films, tmp_path, as_written):
    labels, a, _ = films
    written = labels.assign(**{l: as_written(labels[l]) for l in LABELS})
    written.to_csv(tmp_path/'labels.csv', index=False)
    for truth in (written, tmp_path/'labels.csv'):
        study = read(a, truth)
        assert study.targets(study.folds).sum().to_dict() == labels[LABELS].sum().to_dict()


def test_labels_beside_the_scores_and_prefixes_as_arms(films):
    labels, a, b = films
    table = labels.rename(columns={l: f'y_{l}' for l in LABELS})
    for name, scores in (('dense', a), ('res_seed1', a), ('res_seed2', b)):
        table = table.join(scores[LABELS].add_prefix(f'{name}_'))
    study = read(table)
    assert study.arms == ['dense', 'res'] and study.grid('res') == ((1, 2), (0, 1, 2)) and study.labels == LABELS
    np.testing.assert_allclose(probs(study, 'res')[0], probs(study, 'dense')[0])


def test_a_long_table_with_labels_seeds_and_arms(films):
    labels, a, b = films
    truth = labels.melt(['image', 'patient', 'fold'], LABELS, 'finding', 'target')
    parts = [t.melt('image', LABELS, 'finding', 'probability').assign(arm=arm) for t, arm in ((a, 'one'), (b, 'two'))]
    long = pd.concat(parts).merge(truth, on=['image', 'finding']).sample(frac=1, random_state=0)
    study = read(long)
    assert study.arms == ['one', 'two'] and sorted(study.labels) == sorted(LABELS)
    y, order = labels.sort_values('image')[study.labels], study.films(study.folds).row.to_numpy()
    assert (study.targets(study.folds).to_numpy()[np.argsort(order)] == y.to_numpy()).all()


def test_one_finding_as_score_and_label():
    table = pd.DataFrame(dict(image=list('abcd'), patient=list('pqrs'), label=[0, 1, 0, 1], score=[.1, .8, .4, .3]))
    study = read(table, n_splits=1)
    assert macro_auc(study.targets((0,)), probs(study)[0]).macro == .75


def test_numbered_columns_have_the_order_that_is_said(films):
    labels, a, _ = films
    table = a[['image']].join(pd.DataFrame({str(i): a['Edema'] if l == 'Edema' else .5 for i, l in enumerate(XRV)}))
    study = read(table, labels, order='xrv')
    assert set(study.labels) == set(LABELS)
    np.testing.assert_allclose(np.sort(probs(study)[0][:, study.labels.index('Edema')]), np.sort(a.Edema))
    refused('say whose order they have', table, labels)
    refused('18 numbered columns, and the order chexpert 14 findings', table, labels, order='chexpert')
    refused("there is no order of findings 'xvr'; did you mean 'xrv'", table, labels, order='xvr')


def test_a_competition_submission_against_its_training_labels(tmp_path):
    y, z, patients = simulate(60, [.3] * 14, [1.5] * 14)
    names = [f'{p:05d}_1_{i}.jpg' for i, p in enumerate(patients)]
    pd.DataFrame(dict(Image_name=names)).join(pd.DataFrame(expit(z), columns=CHEXPERT)).to_csv(tmp_path/'submission.csv', index=False)
    pd.DataFrame(dict(Image_name=names, Sex='Male', Age=50)).join(pd.DataFrame(y, columns=CHEXPERT)).to_csv(
        tmp_path / 'train.csv', index=False
    )
    study = read(tmp_path/'submission.csv', tmp_path/'train.csv')
    assert study.labels == CHEXPERT and any('as Grand X-Ray Slam writes them' in n for n in study.notes)
    assert study.films(study.folds).patient.nunique() == len(set(patients))


def test_nih_list_of_findings(films, tmp_path):
    labels, a, _ = films
    named = ['|'.join(l for l in LABELS if row[l]) or 'No Finding' for _, row in labels.iterrows()]
    nih = pd.DataFrame({'Image Index': labels.image, 'Finding Labels': named, 'Patient ID': labels.patient})
    assert read(a, nih).targets((0, 1, 2)).sum().to_dict() == {l: labels[l].sum() for l in sorted(LABELS)}


def test_zero_and_one_and_every_digit_stay_as_they_are(films):
    labels, a, _ = films
    p = np.random.default_rng(0).random(len(a))**20
    p[:4] = 0, 1, 1e-300, 1 - 1e-16
    study = read(a.assign(Edema=p), labels)
    got = np.sort(probs(study)[0][:, 0])
    np.testing.assert_allclose(got, np.sort(p), rtol=1e-12, atol=1e-300)


def test_folds_are_made_by_patient_and_said(films, capsys):
    labels, a, _ = films
    study = read_predictions(a, labels.drop(columns='fold'), n_splits=4, seed=7)
    told = capsys.readouterr().out
    assert '4 folds by patient, made here with seed 7' in told and len(study.folds) == 4
    films = study.films(study.folds)
    assert films.groupby('patient').fold.nunique().max() == 1
    again = read(a, labels.drop(columns='fold'), n_splits=4, seed=7)
    assert again.films(again.folds).equals(films)


def test_the_mapping_is_printed(films, capsys):
    labels, a, _ = films
    read_predictions(a.rename(columns={'Pleural Effusion': 'Effusion', 'Lung Lesion': 'Nodulus'}), labels, names={'Nodulus': 'Lung Lesion'})
    told = capsys.readouterr().out
    assert "Pleural Effusion is read from 'Effusion'" in told and "Lung Lesion is read from 'Nodulus'" in told


def test_uncertain_labels_and_findings_that_are_left_out(films):
    labels, a, b = films
    odd = labels.assign(Edema=labels.Edema.where(labels.index % 5 > 0, -1), Hernia=1)
    for how, expected in dict(ignore=np.nan, zeros=0, ones=1).items():
        study = read(dict(old=a, new=b.drop(columns='Lung Lesion')), odd, uncertain=how)
        y = study.targets(study.folds).Edema
        assert study.labels == LABELS[:2] and y.isna().any() == np.isnan(expected)
    assert 'left out, as new does not predict them: Lung Lesion' in study.notes and 'labels that nobody predicts: Hernia' in study.notes


# ---- bad input

def test_films_that_a_file_lacks(films):
    labels, a, b = films
    refused(r'lacks 3 films that another file has \(images/f000, images/f001, images/f002\).*only_shared', dict(old=a, new=b[3:]), labels)
    study = read(dict(old=a, new=b[3:]), labels, only_shared=True)
    assert len(study.films(study.folds)) == len(a) - 3 and '3 films are left out: not every file has them' in study.notes
    refused('no film is in all files', a.assign(image=a.image + 'x'), labels)


def test_films_twice(films):
    labels, a, _ = films
    refused('2 films are there more than once', pd.concat([a, a[:2]]), labels)
    refused('there more than once', pd.concat([a, a[:1].assign(image='./images/f000')]), labels)
    long = a.melt('image', LABELS, 'finding', 'probability')
    refused('has Edema more than once', pd.concat([long, long[:1]]), labels)


def test_probabilities_beside_logits(films):
    labels, a, _ = films
    refused('Edema is .* and the other findings are within 0 to 1', a.assign(Edema=logit(a.Edema)), labels)
    refused('nothing is below 0, as logits would be', a.assign(**{l: a[l] * 100 for l in LABELS}), labels)
    refused('a probability is within 0 to 1', a.assign(**{l: logit(a[l]) for l in LABELS}), labels, logits=False)


def test_scores_that_are_none(films):
    labels, a, _ = films
    refused(
        "Edema is 'high' for images/f002.png: a score is a number",
        a.assign(Edema=a.Edema.astype(object).where(a.index != 2, 'high')),
        labels,
    )
    refused('cannot be judged', a.assign(Edema=a.Edema.where(a.index != 2)), labels)


def test_a_patient_in_two_folds(films):
    labels, a, _ = films
    i = labels.index[labels.patient.duplicated()][0]
    refused('1 patients are in two folds or more', a, labels.assign(fold=labels.fold.where(labels.index != i, (labels.fold + 1) % 3)))
    refused('a fold is 0, 1, 2', a, labels.assign(fold=labels.fold.where(labels.index > 0, -1)))


def test_labels_of_one_class(films):
    labels, a, _ = films
    study = read(a, labels.assign(Edema=0))
    assert 'Edema has no AUC: no positive' in study.notes
    refused(r'no finding has both classes \(Edema: no positive', a, labels.assign(**dict.fromkeys(LABELS, 0)))
    refused('Edema is 2.0 for images/f001.png', a, labels.assign(Edema=labels.Edema.where(labels.index != 1, 2)))


def test_names_that_are_not_there(films):
    labels, a, _ = films
    refused("there is no finding in the labels 'Edem'; did you mean 'Edema'", a, labels, names={'Mass': 'Edem'})
    refused("names says 'Edemaa', and no file has such a column; did you mean 'Edema'", a, labels, names={'Edemaa': 'Edema'})
    refused("there is no column 'Patiant'; did you mean", a, labels, columns=dict(patient='Patiant'))
    refused('both stand for', a.assign(effusion=.5, **{'pleural_effusion': .5}), labels)
    refused('stands for a finding of the labels', a[['image']].assign(Mass=.5), labels)


def test_without_patients_or_labels(films):
    labels, a, _ = films
    alone = labels.drop(columns='patient').assign(fold=range(len(labels)))
    refused('no file has a column for the patient', a, alone)
    each = read(a, alone.drop(columns='fold'), columns=dict(patient='image'))
    assert each.films(each.folds).patient.nunique() == len(a)
    refused('no column of labels', a)
    refused('3 films have no patient', a, labels.assign(patient=labels.patient.where(labels.index > 2, '')))


def test_files_that_disagree(films):
    labels, a, _ = films
    other = a.assign(patient=labels.patient.where(labels.index != 4, 'x'))
    refused("patient of .* is '.*' in .* and 'x' in .*1 such films", other, labels)


def test_files_that_are_no_tables(films, tmp_path):
    labels, a, _ = films
    refused('there is no file', tmp_path/'p.csv', labels)
    for name, content in dict(empty=b'', header=b'image,Edema\n', broken=b'image,Edema\na,1,2,3\n', binary=b'\xff\xfe\x00\x01\x80').items():
        path = tmp_path/f'{name}.csv'
        path.write_bytes(content)
        refused(f'{name}.csv', path, labels)
    (tmp_path/'twice.csv').write_text('image,Edema,Edema\na,.1,.2\n')
    refused("the column 'Edema' is there twice", tmp_path/'twice.csv', labels)
    a.to_csv(tmp_path/'p.csv', index=False)
    (tmp_path/'b').mkdir()
    a.to_csv(tmp_path/'b'/'p.csv', index=False)
    refused('2 files are called p: say which arms they are', [tmp_path/'p.csv', tmp_path/'b'/'p.csv'], labels)


def test_patients_keep_their_zeros_and_may_be_called_na(films, tmp_path):
    labels, a, _ = films
    first = labels.patient[0]
    labels.assign(patient=labels.patient.replace(first, 'NA')).to_csv(tmp_path/'labels.csv', index=False)
    found = set(read(a, tmp_path/'labels.csv').films((0, 1, 2)).patient)
    assert 'NA' in found and first not in found and all(len(p) == 3 or p == 'NA' for p in found)


def test_no_torch():
    code = 'import sys, cxrlg.evaluate, cxrlg.predictions, cxrlg.decisions; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


def test_one_row_a_film_and_finding_under_one_id(films):
    "As some competitions ask: `film_Finding`, findings and films with underscores of their own"
    truth, wide, _ = films
    long = wide.melt('image', var_name='f', value_name='Label')
    long = pd.DataFrame(dict(ID=long.image + '_' + long.f.str.replace(' ', '_'), Label=long.Label)).sample(frac=1, random_state=0)
    same(read(long, truth), wide)
    refused('is nan for images.f.*: a film without a score', long[1:], truth)
    refused('are their names spelled alike', long[100:], truth)


def test_films_are_known_by_one_key():
    truth = pd.DataFrame(dict(image=['a//b.png', './c/é.png', ' d.png '], patient=[1, 2, 3], Edema=[0, 1, 1], Mass=[1, 0, 0]))
    scores = pd.DataFrame(dict(image=['a/b', 'c/e\u0301', 'd'], Edema=[.1, .2, .3], Mass=[.4, .5, .6]))
    assert len(read_predictions(scores, truth, n_splits=1, verbose=False).films((0,))) == 3


# ---- kinds of faults that gave wrong numbers without a word

@pytest.fixture(scope='module')
def small():
    "Labels of 120 films of 60 patients, and their scores"
    rng = np.random.default_rng(0)
    people = dict(film=[f'{i:05}.png' for i in range(120)], patient=[f'p{i//2}' for i in range(120)])
    labels = pd.DataFrame(people | dict(A=rng.integers(0, 2, 120), B=rng.integers(0, 2, 120)))
    return labels, labels[['film']].assign(A=rng.random(120), B=rng.random(120))


def listed(labels, bar):
    "The labels as NIH lists them"
    names = [bar.join(l for l in 'AB' if row[l]) or 'No Finding' for _, row in labels.iterrows()]
    return labels.drop(columns=['A', 'B']).assign(**{'Finding Labels': names})


@pytest.mark.parametrize('bar', ['|', ' | ', ' |', '| '])
def test_names_joined_by_a_bar_with_blanks(small, bar):
    labels, scores = small
    study = read(scores, listed(labels, bar))
    found = study.films(study.folds).set_index('image')[['y:A', 'y:B']].loc[labels.film].to_numpy()
    assert study.labels == ['A', 'B'] and (found == labels[['A', 'B']].to_numpy()).all()


@pytest.mark.parametrize('bar', [',', ', ', ';', '/', ' & ', '+'])
def test_names_joined_by_anything_else_are_refused(small, bar):
    labels, scores = small
    refused(r"which is no finding: join several names by \|, as in 'A\|B'", scores, listed(labels, bar))


def test_a_finding_that_holds_a_slash_is_one():
    names = ['Lung/Pleura', 'Mass', 'Lung/Pleura|Mass', '']
    labels = pd.DataFrame({'film': list('abcd'), 'patient': list('1234'), 'Finding Labels': names})
    scores = pd.DataFrame({'film': list('abcd'), 'Lung/Pleura': [.1, .2, .3, .4], 'Mass': [.1, .2, .3, .4]})
    assert read(scores, labels, n_splits=1).labels == ['Lung/Pleura', 'Mass']


@pytest.mark.parametrize('one, other', [('{}', '{}.0'), ('{}', '00{}'), ('p{}', 'P{}')])
def test_a_patient_under_two_spellings_is_named_and_merged_where_asked(small, one, other):
    labels, scores = small
    told = labels.assign(patient=[(other if i % 2 else one).format(1 + i // 2) for i in range(120)])
    apart, merged = read(scores, told), read(scores, told, merge_patients=True)
    assert apart.films(apart.folds).patient.nunique() == 120
    assert any('60 patients may be spelt in several ways' in n and 'merge_patients' in n for n in apart.notes)
    films = merged.films(merged.folds)
    assert films.patient.nunique() == 60 and films.groupby('patient').fold.nunique().max() == 1
    assert any('merged 60 patients' in n for n in merged.notes)


def test_blanks_and_decimals_make_no_other_study_view_or_sex(small):
    labels, scores = small
    odd = [i % 2 == 1 for i in range(120)]
    told = labels.assign(study=[f'{i//2}' + '.0' * o for i, o in enumerate(odd)], sex=['M' + ' ' * o for o in odd],
                         view=['PA' + ' ' * o for o in odd])
    study = read(scores, told)
    films = by_unit(study, 'study').films(study.folds)
    assert len(films) == 60 and set(films['view']) == {'PA'} and set(films.sex) == {'M'}


def test_a_file_that_is_cut_off(small, tmp_path):
    labels, scores = small
    for sep in (',', ';'):
        (tmp_path/'l.csv').write_text(labels.to_csv(index=False, sep=sep).rstrip().rsplit(sep, 1)[0])
        refused('l.csv ends in the middle of a row .its last row has 3 cells under a header of 4', scores, tmp_path/'l.csv')


def test_two_models_that_pandas_has_merged(small):
    labels, scores = small
    both = scores.merge(scores.assign(A=1 - scores.A), on='film')
    study = read(both, labels)
    assert study.arms == ['x', 'y']
    np.testing.assert_allclose(probs(study, 'y')[..., 0], 1 - probs(study, 'x')[..., 0])
    beside = read(scores.merge(labels, on='film'))
    assert beside.arms == ['x'] and beside.targets(beside.folds).sum().tolist() == labels[['A', 'B']].sum().tolist()
    unused = read(scores.assign(y_A=labels.A), labels)
    assert 'not used of the table: y_A' in unused.notes
    refused("'y_A' and 'A_y' both are labels of 'A'", scores.assign(y_A=labels.A, A_y=labels.A, patient=labels.patient))


def test_seeds_as_decimal_numbers_are_seeds(small):
    labels, scores = small
    study = read(pd.concat([scores.assign(seed=1.0), scores.assign(seed=2.0)]), labels)
    assert len(study.arms) == 1 and study.grid(study.reference)[0] == (1, 2)
    refused("seed is '1.5': a seed is a whole number", scores.assign(seed=1.5), labels)
    refused('seed is blank in 1 rows', scores.assign(seed=[None] + [1] * 119), labels)


def test_ages_that_are_none_are_counted(small):
    labels, scores = small
    ages = ['>89', '90+', 'unknown', '58,5', '-1', '411', '058Y', '006M', '', '33']
    study = read(scores, labels.assign(age=ages * 12))
    age = study.films(study.folds).set_index('image').age.loc[labels.film[:10]]
    assert age.fillna(-9).tolist() == [-9] * 6 + [58, .5, -9, 33]
    assert any(n.startswith("72 ages are no number of years from 0 to 110 ('>89', '90+'") for n in study.notes)
    numbers = read(scores, labels.assign(age=[-1, 411, 50] * 40))
    assert any(n.startswith('80 ages are no number') for n in numbers.notes)


def test_a_file_whose_name_is_no_text(small, tmp_path):
    labels, scores = small
    path = str(tmp_path/'caf') + '\udce9.csv'
    try: scores.to_csv(path, index=False)
    except (OSError, UnicodeError): pytest.skip('this file system holds names of text only')
    refused(r'the name of .*caf\\udce9.csv holds what is no text in UTF-8: rename it', path, labels)


def test_names_that_cannot_be_told_apart(small):
    labels, scores = small
    refused("the column 'film' is there twice", scores.assign(**{'film ': scores.film}), labels)
    refused("'macro' cannot be a finding", scores.assign(macro=scores.A), labels.assign(macro=labels.A))
    refused("'A' and 'a' are one finding in two spellings", scores, labels.assign(a=labels.B))


ROOTS = [('CheXpert-v1.0/', '/data/CheXpert-v1.0/'), ('', '/data/CheXpert-v1.0/'), ('/a/b/', '/mnt/'), ('a/', 'b/c/')]


@pytest.mark.parametrize('at, root', ROOTS)
def test_films_under_other_folders(small, at, root):
    labels, scores = small
    films = pd.Series([f'{"train" if i % 2 else "valid"}/patient{i:05}/study1/view1_frontal.jpg' for i in range(120)])
    study = read(scores.assign(film=root + films), labels.assign(film=at + films))
    assert len(study.films(study.folds)) == 120
    train = films.str.startswith('train')
    some = read(scores.assign(film=root + films)[train], labels.assign(film=at + films), only_shared=True)
    assert len(some.films(some.folds)) == 60


def test_messages_say_what_is_wrong(small):
    labels, scores = small
    refused('A is 1.0000001 for 00003.png', scores.assign(A=scores.A.where(scores.index != 3, 1.0000001)), labels)
    refused('have become decimal numbers', scores.assign(film=np.arange(120.)), labels.assign(film=range(120)))
    for n in (-3, 0, 1.5): refused(f'n_splits={n}: give a whole number', scores, labels, n_splits=n)
    long = scores.melt('film', ['A', 'B'], 'finding', 'Label')
    ids = pd.DataFrame(dict(Id=long.film.str.removesuffix('.png') + '_' + long.finding, Label=long.Label))
    refused('B is nan for 00119', ids[:-1], labels)
    assert read({'two\nlines': scores}, labels).arms == ['two lines']
