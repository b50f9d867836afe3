"Readers: text as it is written, what is cut off or misspelt by name, and the ways in which data sets lose labels and films"
import csv
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ROOT
from cxrlg.core import DataError, film_key, labels_of
from cxrlg.data import CHEXPERT, audit, read_table, reader_options
from cxrlg.readers import film_stem, read_csv, years
from folders import GOOD, good, table, write_films, write_rows  # noqa: F401 (fixtures)

HEAD = 'image,patient,Edema,Mass\n'
MIMIC = 'subject_id,study_id,'
BLANK = ',' * 13


def checks(problems): return dict(zip(problems.check, problems.rows))


# ---- text

def test_ids_are_what_is_written(good):
    write_rows(good, ['f0.png,NA,0,1', 'f1.png,None,0,1', 'f2.png, 007 ,NA,null', 'f3.png,7,,N/A', 'f4.png,1e3,0,1', 'f5.png,null,1,0'])
    table = read_table('csv', good, verbose=False, **GOOD)
    assert table.patient.tolist() == ['NA', 'None', '007', '7', '1e3', 'null']
    assert np.array_equal(table.Mass, [1, 1, np.nan, np.nan, 1, 0], equal_nan=True)
    assert checks(audit(table, verbose=False))['patient that may be no id'] == [0, 1, 5]


def test_a_film_called_NA(tmp_path):
    write_films(tmp_path, ['NA.png'])
    (tmp_path / 'PADCHEST.csv').write_text("ImageID,PatientID,Labels\nNA,NA,['nodule']\n")
    assert read_table('padchest', tmp_path, min_films=1, verbose=False).image.tolist() == ['NA.png']


@pytest.mark.parametrize('word', ['nan', 'NaN', '<NA>', '#N/A', 'NaT'])
def test_what_a_program_writes_for_no_patient_is_named(good, word):
    write_rows(good, ['f0.png,p0,0,1', f'f1.png,{word},0,1'])
    with pytest.raises(DataError, match=rf"patient is blank in 1 rows \(row 1\); '{word}' counts as blank"):
        read_table('csv', good, verbose=False, **GOOD)


def test_blanks_around_everything(good):
    (good / 'labels.csv').write_text(' image ,patient , Edema,Mass \n f0.png , p0 , ,TRUE\nf1.png,p0, 1 ,false\n\nf2.png,p1,\t,-1.0\n')
    table = read_table('csv', good, verbose=False, uncertain='ones', **GOOD)
    assert table.image.tolist() == ['f0.png', 'f1.png', 'f2.png'] and table.patient.tolist() == ['p0', 'p0', 'p1']
    assert np.array_equal(table[['Edema', 'Mass']], [[np.nan, 1], [1, 0], [np.nan, 1]], equal_nan=True)


BROKEN = {
    'title': ('Export of today\n' + HEAD + 'f0.png,p,0,1\n', r"no column 'image'.*: its header is in line 2; remove what stands above it"),
    'title as a spreadsheet saves it': ('Title,,,\n,,,\n' + HEAD + 'f0.png,p,0,1\n', 'its header is in line 3'),
    'a cell too many': (HEAD + 'f0.png,p,0,1\n"f\n1.png",p,0,1,9\n', r'broken row \(line 4: 5 cells under a header of 4\)'),
    'open quote': (HEAD + 'f0.png,p,0,1\n"f1.png,p,0,1\n', r'broken row \(line 3: a quotation mark is opened there'),
    'cut off in a cell': (HEAD + 'f0.png,p,0,1\nf1.png,p', 'ends in the middle of a row .its last row has 2 cells under a header of 4'),
    'cut off in a name': (HEAD + 'f0.png,p,0,1\nf1', 'its last row has 1 cells'),
    'twice but for blanks': ('image,patient,Edema, Edema,Mass\nf0.png,p,0,1,1\n', "the column 'Edema' is there twice"),
}


@pytest.mark.parametrize('name', BROKEN)
def test_what_is_broken_is_said_with_its_line(good, name):
    text, message = BROKEN[name]
    (good / 'labels.csv').write_text(text)
    with pytest.raises(DataError, match=message) as e: read_table('csv', good, verbose=False, **GOOD)
    assert '\n' not in str(e.value) and not any(word in str(e.value) for word in ('index_col', 'tokenizing', 'C error', 'Expected'))


def test_a_spreadsheet_that_leaves_out_blanks_at_the_end_is_read(good):
    (good / 'labels.csv').write_text(HEAD + 'f0.png,p,0\nf1.png,p,0,1\nf2.png,p,0\n')
    assert np.array_equal(read_table('csv', good, verbose=False, **GOOD).Mass, [np.nan, 1, np.nan], equal_nan=True)


def test_a_column_called_like_a_second_one_of_pandas(good):
    (good / 'labels.csv').write_text('image,patient,Edema,Edema.1,Mass\nf0.png,p,0,1,1\n')
    assert read_table('csv', good, verbose=False, **GOOD).Mass.tolist() == [1]


def test_a_cell_with_a_long_report_and_a_blank_one_at_the_end(good):
    (good / 'labels.csv').write_text('image,patient,Edema,text,Mass\nf0.png,p,0,,1\n' + f'f1.png,p,1,{"x" * 200_000},\n')
    assert read_table('csv', good, verbose=False, **GOOD).Mass.fillna(9).tolist() == [1, 9]


@pytest.mark.parametrize(
    'start, message',
    [(b'\x1f\x8b\x08', 'is packed by gzip'), (b'PK\x03\x04', 'is an Excel workbook or a zip archive'), (b'\xd0\xcf\x11\xe0', 'Excel')],
)
def test_what_is_no_text_is_said(good, start, message):
    (good / 'labels.csv').write_bytes(start + b'abc\n')
    with pytest.raises(DataError, match=message): read_table('csv', good, verbose=False, **GOOD)


def test_what_a_mac_adds_to_an_archive_is_left_alone(tmp_path):
    (tmp_path / 'a.csv').write_text('Image_name,' + ','.join(CHEXPERT) + '\n1_2_3.jpg' + ',0' * 14 + '\n')
    (tmp_path / '._a.csv').write_bytes(b'\0\5\x16\7')
    assert len(read_table('slam', tmp_path, exists=False, verbose=False)) == 1
    reports = tmp_path / 'ecgen-radiology'
    reports.mkdir()
    (reports / '1.xml').write_text('<eCitation><uId id="C1"/><parentImage id="C1_1"/></eCitation>')
    (reports / '._1.xml').write_bytes(b'\0\5\x16\7')
    assert read_table('openi', tmp_path, exists=False, verbose=False).image.tolist() == ['C1_1.png']


CELLS = st.text(st.characters(codec='utf-8', exclude_categories=['Cs'], exclude_characters='\0\ufeff'), max_size=6)


@settings(derandomize=True, deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELLS, st.sampled_from(['', '1', '0', '-1', '1.0'])), min_size=1, max_size=5), st.sampled_from(['\n', '\r\n']),
       st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.booleans())
def test_text_of_any_kind_comes_back(tmp_path, rows, end, quoting, bom):
    said = io.StringIO(newline='')
    quoting = csv.QUOTE_ALL if any('\r' in name for name, _ in rows) else quoting
    csv.writer(said, lineterminator=end, quoting=quoting).writerows([['patient', 'Edema', 'end'], *[(*row, 'x') for row in rows]])
    (tmp_path / 'a.csv').write_bytes(said.getvalue().encode('utf-8-sig' if bom else 'utf-8'))
    df = read_csv(tmp_path / 'a.csv', ['patient', 'Edema'], ids=['patient'])
    assert df.patient.fillna('').tolist() == [name.strip() for name, _ in rows]
    assert np.array_equal(pd.to_numeric(df.Edema), [float(v) if v else np.nan for _, v in rows], equal_nan=True)


WRITTEN = {'58': 58, '058Y': 58, '6 months': .5, '2 yrs': 2, '12M': 1, '58.0': 58, '45 years old': 45, '-3': -3}
NO_AGES = ['12/05/1980', '1980-05-12', '25-34', '45,5', '5 feet', '58Y 3M', '>89', '1e1']


def test_what_is_no_age_is_unknown_and_counted():
    assert np.allclose(years(pd.Series(list(WRITTEN))), list(WRITTEN.values()))
    with pytest.warns(UserWarning, match=r'8 ages cannot be read as years \(12/05/1980, 1980-05-12, 25-34 and 5 more'):
        assert years(pd.Series(NO_AGES)).isna().all()


def test_ages_that_cannot_be_read_are_counted():
    with pytest.warns(UserWarning, match='2 ages cannot be read as years .>89, old.'):
        assert np.array_equal(
            years(pd.Series(['>89', 'old', ' 058Y', None], dtype=object)),
            np.float32([np.nan, np.nan, 58, np.nan]),
            equal_nan=True,
        )
    for kind in ('Int64', 'int64[pyarrow]', 'Float64'):
        assert np.array_equal(years(pd.Series(pd.array([58, None], dtype=kind))), np.float32([58, np.nan]), equal_nan=True)


def test_audit_of_ages_that_are_text(table):
    assert checks(audit(table.assign(age=['40', '411Y', '50', '-3', None, '60']), verbose=False))['age'] == [1, 3]


# ---- one film

def test_stems():
    names = ['d/a.PNG', 'a.jpeg', './a.dcm ', 'a', 'a.b.png', '1.2.840.1', '.png', 'a.tif', 'e\u0301.jpg']
    assert [film_stem(n) for n in names] == ['a', 'a', 'a', 'a', 'a.b', '1.2.840.1', '', 'a.tif', '\u00e9']


@pytest.mark.parametrize('again', ['f0.png ', './f0.png', './/f0.png', 'x/../f0.png', ' . /f0.png'])
def test_a_film_listed_under_two_spellings(good, again):
    write_rows(good, ['f0.png,p0,0,1', f'"{again}",p1,1,0'])
    message = 'leave the root' if '..' in again else 'listed more than once'
    with pytest.raises(DataError, match=message): read_table('csv', good, verbose=False, **GOOD)


def test_a_film_is_found_in_any_unicode_form_also_of_its_folder(tmp_path):
    write_films(tmp_path, ['Mu\u0308ller/e\u0301.png', 'plain.png'])
    write_rows(tmp_path, ['M\u00fcller/\u00e9.png,p0,0,1', 'plain.png,p1,1,0', 'M\u00fcller/a.png,p1,1,0'])
    table = read_table('csv', tmp_path, verbose=False, **GOOD)
    assert table.image.tolist() == ['Mu\u0308ller/e\u0301.png', 'plain.png'] and table.attrs['left_out'] == 1
    assert all((tmp_path / f).is_file() for f in table.image)


def padchest(root, *names):
    (root / 'PADCHEST.csv').write_text('ImageID,PatientID,Labels\n' + ''.join(f"{n},{i},['mass']\n" for i, n in enumerate(names)))
    return read_table('padchest', root, min_films=1, verbose=False)


def test_unlisted_twins_do_not_matter_and_the_listed_name_counts(tmp_path):
    write_films(tmp_path, ['a.png', 'a.jpg', 'thumbs/b.png', 'old/b.jpg', 'c.png', 'x/c.png'])
    assert padchest(tmp_path, 'a.png').image.tolist() == ['a.png'] and padchest(tmp_path, 'a.jpg').image.tolist() == ['a.jpg']
    assert padchest(tmp_path, 'a.png', 'a.jpg').image.tolist() == ['a.png', 'a.jpg'] and padchest(
        tmp_path, 'b.jpg'
    ).image.tolist() == ['old/b.jpg']
    assert padchest(tmp_path, 'c.png').image.tolist() == ['c.png'] and padchest(tmp_path, 'x/c.png').image.tolist() == ['x/c.png']
    with pytest.raises(DataError, match='2 files that share their name with another .old/b.jpg, thumbs/b.png'): padchest(tmp_path, 'b.dcm')


def test_one_file_listed_under_two_suffixes(tmp_path):
    write_films(tmp_path, ['a.png'])
    with pytest.raises(DataError, match=r'2 rows name a film that another row names \(a.dcm, a.jpg\)'): padchest(tmp_path, 'a.dcm', 'a.jpg')


def test_files_without_a_suffix_are_found_by_their_name(tmp_path):
    write_films(tmp_path, ['b.png'])
    for name in ('IM000001', 'd/1.2.840.1'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((tmp_path / 'b.png').read_bytes())
    assert padchest(tmp_path, 'IM000001', '1.2.840.1', 'b').image.tolist() == ['IM000001', 'd/1.2.840.1', 'b.png']


def test_folders_that_link_to_themselves_and_to_each_other(tmp_path):
    write_films(tmp_path, ['one/a.png', 'two/b.png'])
    for link, to in {'one/self': '.', 'one/two': '../two', 'two/one': '../one', 'all': '.', 'zero': 'nowhere'}.items():
        (tmp_path / link).symlink_to(to)
    assert padchest(tmp_path, 'a.png', 'b.png').image.tolist() == ['one/a.png', 'two/b.png']
    (tmp_path / 'again.png').symlink_to('one/a.png')
    (tmp_path / 'three').mkdir()
    (tmp_path / 'three' / 'a.png').symlink_to('../one/a.png')
    assert len(padchest(tmp_path, 'a.png')) == 1


def test_audit_of_one_film_under_two_spellings(table):
    got = checks(
        audit(
            table.assign(
                image=['a.png', './a.png', 'e\u0301.png', '\u00e9.png', 'c.png', 'd.png'],
                Edema=0.0,
                Mass=[0, 1, 0, 0, 1, 1.0],
            ),
            verbose=False,
        )
    )
    assert got['image twice, other labels'] == [0, 1] and got['image twice'] == [2, 3]


@pytest.mark.parametrize('locale, read', [({}, True), (dict(PYTHONUTF8='0', PYTHONCOERCECLOCALE='0'), False)])
def test_an_ascii_locale(tmp_path, locale, read):
    write_films(tmp_path, ['\u00e9.png', 'b.png'])
    write_rows(tmp_path, ['\u00e9.png,M\u00fcller,0,1', 'b.png,p,1,0'])
    call = "read_table('csv', sys.argv[1], labels=['Edema', 'Mass'], verbose=False)"
    code = f'import sys; from cxrlg.data import read_table; print(len({call}))'
    env = os.environ | dict(LC_ALL='C', PYTHONPATH=str(ROOT)) | locale
    out = subprocess.run([sys.executable, '-c', code, str(tmp_path)], env=env, capture_output=True, text=True)
    if read: assert out.stdout == '2\n', out.stderr
    else: assert 'DataError: the locale (ascii) has no way to name the film' in out.stderr.replace('utf-8', 'ascii')


# ---- one patient

def test_patients_under_two_spellings_are_told_and_merged_when_asked(good, capsys):
    write_rows(good, ['f0.png,12,0,1', 'f1.png,12.0,1,0', 'f2.png,007,0,1', 'f3.png,7,1,0', 'f4.png,7,1,0', 'f5.png,8,1,0'])
    table = read_table('csv', good, verbose=False, **GOOD)
    assert table.patient.tolist() == ['12', '12.0', '007', '7', '7', '8']
    problem = audit(table, verbose=False).set_index('check').loc['patient spelt in several ways']
    assert problem.rows == [0, 1, 2, 3, 4] and '7 = 007, 12 = 12.0' in problem.what and 'merge_patients=True' in problem.do
    assert problem.severity == 'warning'
    merged = read_table('csv', good, merge_patients=True, **GOOD)
    assert merged.patient.tolist() == ['12', '12', '7', '7', '7', '8']
    assert 'merged 2 patients that are spelt in several ways (7 = 007, 12 = 12.0)' in capsys.readouterr().out
    assert 'patient spelt in several ways' not in checks(audit(merged, verbose=False))


def test_ids_that_a_spreadsheet_has_rounded(table):
    got = checks(audit(table.assign(patient=['1.23457E+11', '1.23457E+11', '4E+15', '12', '5e12', '13']), verbose=False))
    assert got['patient rounded'] == [0, 1, 2]


@pytest.mark.parametrize('first, second', [('12345678901234567', '12345678901234569'), ('001', '1'), ('1.2', '1.20'), ('1e3', '1000')])
def test_studies_are_what_is_written(good, first, second):
    write_rows(good, [f'f0.png,p,0,1,{first},1', f'f1.png,p,1,0,{second},', 'f2.png,p,1,0, ,1'], 'image,patient,Edema,Mass,visit,view')
    table = read_table('csv', good, study='visit', view='view', verbose=False, **GOOD)
    assert table.study.fillna('').tolist() == [first, second, ''] and table.view.fillna('').tolist() == ['1', '', '1']
    assert 'study with other labels' not in checks(audit(table, verbose=False))


# ---- the options of a reader

OPTIONS = [
    ('csv', dict(csv=None), "the option 'csv' is blank: give text"),
    ('csv', dict(csv=5), "the option 'csv' is 5: give text, in quotes where it is a number"),
    ('csv', dict(csv=['a.csv']), "the option 'csv' is ..a.csv"),
    ('csv', dict(image=None), "the option 'image' is blank"),
    ('csv', dict(patient=' '), "the option 'patient' is ' '"),
    ('csv', dict(exists='false'), "the option 'exists' is 'false': give true or false"),
    ('csv', dict(uncertain={'Edema': ['ones']}), "uncertain=..ones.. for Edema: choose 'ignore'"),
    ('csv', dict(definite='no'), "the option 'definite' is 'no': give true or false"),
    ('nih', dict(no_finding='false'), "the option 'no_finding' is 'false': give true or false"),
    ('nih', dict(no_finding=None), "the option 'no_finding' is blank"),
    ('padchest', dict(min_films='many'), "the option 'min_films' is 'many': give a whole number"),
    ('chestmnist', dict(px='64'), "the option 'px' is '64': give a whole number"),
]


@pytest.mark.parametrize('reader, options, message', OPTIONS)
def test_values_that_no_reader_takes_are_one_line(good, reader, options, message):
    (good / 'Data_Entry_2017.csv').write_text('Image Index,Finding Labels,Patient ID\nf0.png,Mass,1\n')
    (good / 'PADCHEST.csv').write_text("ImageID,PatientID,Labels\nf0.png,1,['mass']\n")
    given = GOOD | options if reader == 'csv' else options
    with pytest.raises(DataError, match=message) as e: read_table(reader, good, verbose=False, **given)
    assert '\n' not in str(e.value)


def test_options_that_are_the_studys_own():
    for name in ('uncertain', 'definite', 'root', 'dataset'):
        with pytest.raises(DataError, match=f"'{name}' is no option of a reader, but the study's own"): reader_options('csv', {name: 'x'})
    assert reader_options('csv', GOOD | dict(exists=False, study=None)) == GOOD | dict(exists=False, study=None)
    with pytest.raises(DataError, match='~nouser/x cannot be found: give its whole path'): read_table('csv', '~nouser/x', **GOOD)


# ---- labels and films that would be lost

def test_a_finding_that_nobody_has_is_named(good, capsys):
    write_rows(good, ['f0.png,p0,1,', 'f1.png,p1,0,'])
    table = read_table('csv', good, **GOOD)
    assert 'no label of Mass is known' in capsys.readouterr().out and checks(audit(table, verbose=False))['no known label'] == [0, 1]


@pytest.mark.parametrize(
    'labels, message',
    [
        (['Edema', 'Edema'], "'Edema' is given twice"),
        (['Edema', ' edema'], "also as 'Edema'"),
        (['Edema', 'patient'], "'patient' cannot be a finding"),
        ([False, 'Edema'], 'in YAML, put it in quotes'),
    ],
)
def test_findings_that_cannot_be_meant(good, labels, message):
    with pytest.raises(DataError, match=message): read_table('csv', good, verbose=False, **GOOD | dict(labels=labels))


def chexpert(root, part, patients, folder=''):
    head = 'Path,Sex,Age,Frontal/Lateral,AP/PA,' + ','.join(CHEXPERT) + '\n'
    rows = [f'CheXpert-v1.0/{part}/patient{p:05}/study1/view1_frontal.jpg,Male,60,Frontal,AP,1.0{BLANK}\n' for p in patients]
    (root / folder).mkdir(exist_ok=True)
    (root / folder / f'{part}.csv').write_text(head + ''.join(rows))


def test_chexperts_views_and_sexes_in_any_case(tmp_path):
    head = 'Path,Sex,Frontal/Lateral,AP/PA,' + ','.join(CHEXPERT) + '\n'
    said = ['female,frontal,AP', 'MALE,Frontal , PA', 'F, ,AP', 'Unknown,LATERAL,', ',Lateral,AP', 'm,,']
    names = ['1_frontal', '2_frontal', '3_frontal', '4_x', '5_x', '6_lateral']
    rows = [f'x/train/patient00001/study1/view{name}.jpg,{o},1.0{BLANK}\n' for name, o in zip(names, said)]
    (tmp_path / 'train.csv').write_text(head + ''.join(rows))
    table = read_table('chexpert', tmp_path, exists=False, verbose=False)
    assert table.view.tolist() == ['AP', 'PA', 'AP', 'L', 'L', 'L']
    assert table.sex.fillna('').tolist() == ['F', 'M', 'F', '', '', 'M']


@pytest.mark.parametrize('cell', ["'normal'", "['normal' 'cardiomegaly']", "['a''b']", 'normal', "{'a': 1}", '[1]', "['a', nan]", '7'])
def test_padchests_labels_are_lists_with_commas(tmp_path, cell):
    (tmp_path / 'PADCHEST.csv').write_text(f'ImageID,PatientID,Labels\na.png,1,"{cell}"\n')
    with pytest.raises(DataError, match='expected a list with commas between its names'): read_table('padchest', tmp_path, min_films=1)


def test_padchests_lists(tmp_path):
    cells = ["['normal', ' ', '']", "('a', 'b ',)", "[u'a', \"\"pott's disease\"\"]", '[]', '', "{'b', 'b'}"]
    rows = ''.join(f'{i}.png,1,"{cell}"\n' for i, cell in enumerate(cells))
    (tmp_path / 'PADCHEST.csv').write_text('ImageID,PatientID,Labels\n' + rows)
    table = read_table('padchest', tmp_path, min_films=1, exists=False, verbose=False)
    assert sorted(labels_of(table)) == ['a', 'b', 'normal', "pott's disease"]
    assert table.a.fillna(9).tolist() == [0, 1, 1, 0, 9, 0] and table.b.fillna(9).tolist() == [0, 1, 0, 0, 9, 1]


def test_vindrs_class_that_is_called_like_a_column(tmp_path):
    (tmp_path / 'train.csv').write_text('image_id,class_name,rad_id\na,image,R1\n')
    with pytest.raises(DataError, match="'image' cannot be a finding"): read_table('vindr', tmp_path, exists=False, agree=1)


def test_archives_that_hold_no_labels(tmp_path):
    path = tmp_path / 'chestmnist.npz'
    def refused(message):
        with pytest.raises(DataError, match=message) as e: read_table('chestmnist', tmp_path)
        assert '\n' not in str(e.value)
    labels = {f'{s}_labels': np.zeros((2, 14), 'uint8') for s in ('train', 'val', 'test')}
    np.savez(path, **labels | dict(val_labels=np.array([{}, None], dtype=object)))
    refused('holds pickled objects, which are not loaded')
    with open(path, 'wb') as f: np.save(f, labels['val_labels'])
    refused('is one array .*, and no archive of several')
    np.savez(path, train_labels=labels['train_labels'])
    refused('holds no val_labels, test_labels')


@pytest.mark.parametrize(
    'changes, rows',
    [
        (dict(study=None), []),
        (dict(study=[None, None, 'a', 'a', 'b', None]), []),
        (dict(image=['f0.png', None, 'f2.png', ' ', 'f4.png', 'f5.png']), [1, 3]),
        (dict(patient=pd.Categorical(['1', None, '3', '3', '4', '4'])), [1]),
        (dict(patient=None), [0, 1, 2, 3, 4, 5]),
        (dict(split=None, view=None, sex=None, age=None), []),
    ],
)
def test_audit_of_columns_that_say_little(good, table, changes, rows):
    problems = audit(table.assign(**changes), good, progress=False, verbose=False)
    fatal = problems[problems.severity == 'fatal']
    assert fatal.rows.sum() == rows if rows else not len(fatal)


@pytest.mark.parametrize('blank, other', [('absent', 0), ('unknown', np.nan)])
def test_a_cell_of_one_blank_changes_no_label(tmp_path, blank, other):
    head = 'Path,' + ','.join(CHEXPERT) + '\n'
    rows = ['1.0' + ', ' * 13, ' ' + ', 1.0' + ',' * 12, '-1.0 ' + ',0, -1.0' + ', ' * 11]
    films = [f'x/train/patient0000{i}/study1/v.jpg,{row}\n' for i, row in enumerate(rows)]
    (tmp_path / 'train.csv').write_text(head + ''.join(films))
    table = read_table('chexpert', tmp_path, blank=blank, uncertain='ones', exists=False, verbose=False)
    assert table.loc[0, CHEXPERT].tolist() == [1] + [0] * 12 + [other] if other == 0 else np.isnan(table['Support Devices'][0])
    assert table['No Finding'].tolist() == [1, 0, 1] and table['Enlarged Cardiomediastinum'].tolist() == [0, 1, 0]
    assert table.Cardiomegaly.fillna(9).tolist() == [0, 0 if other == 0 else 9, 1]
    assert table.Edema.fillna(9).tolist() == [0] + [0 if other == 0 else 9] * 2
    (tmp_path / 'train.csv').write_text(head + films[0].replace('1.0', 'yes'))
    with pytest.raises(DataError, match="No Finding is 'yes' for x/train/patient00000"): read_table('chexpert', tmp_path, blank=blank)


def test_mimics_blanks_of_one_space(tmp_path):
    (tmp_path / 'mimic-cxr-2.0.0-split.csv').write_text('dicom_id,study_id,subject_id,split\na,500,10000032,train\n')
    (tmp_path / 'mimic-cxr-2.0.0-chexpert.csv').write_text(f"{MIMIC}{','.join(CHEXPERT)}\n10000032,500,1.0{', ' * 13}\n")
    table = read_table('mimic', tmp_path, exists=False, verbose=False)
    assert table[CHEXPERT].iloc[0].fillna(9).tolist() == [1] + [0] * 12 + [9]


def test_chexperts_full_download(tmp_path):
    first, second, third = (f'CheXpert-v1.0 batch {k}' for k in ('1 (validate & csv)', '2 (train 1)', '3 (train 2)'))
    chexpert(tmp_path, 'train', [1, 2, 3], first)
    chexpert(tmp_path, 'valid', [9], first)
    film = 'study1/view1_frontal.jpg'
    write_films(tmp_path, [f'{second}/patient00001/{film}', f'{third}/patient00002/{film}', f'{first}/valid/patient00009/{film}'])
    table = read_table('chexpert', tmp_path, verbose=False)
    assert table.split.tolist() == ['train', 'train', 'valid'] and table.attrs['left_out'] == 1
    assert table.image[1] == f'{third}/patient00002/{film}' and table.patient.tolist() == ['patient00001', 'patient00002', 'patient00009']


def test_a_part_of_which_nothing_is_there_is_named(tmp_path):
    chexpert(tmp_path, 'train', [1, 2])
    chexpert(tmp_path, 'valid', [9])
    write_films(tmp_path, ['valid/patient00009/study1/view1_frontal.jpg'])
    with pytest.warns(UserWarning, match='all 2 of train are left out'): assert len(read_table('chexpert', tmp_path, verbose=False)) == 1


def test_chexpert_in_two_sizes_is_not_read_twice(tmp_path):
    for size in ('CheXpert-v1.0', 'CheXpert-v1.0-small'): chexpert(tmp_path, 'train', [1], size)
    with pytest.raises(DataError, match='holds 2 files .*CheXpert-v1.0-small/train.csv.*name it with csv='):
        read_table('chexpert', tmp_path)


def mimic(root, study, labelled):
    (root / 'mimic-cxr-2.0.0-split.csv').write_text(f'dicom_id,study_id,subject_id,split\na,{study},10000032,train\nb,501,10000032,train\n')
    (root / 'mimic-cxr-2.0.0-chexpert.csv').write_text(f"{MIMIC}{','.join(CHEXPERT)}\n10000032,{labelled},1.0{BLANK}\n")
    return read_table('mimic', root, exists=False)


@pytest.mark.parametrize('study, labelled', [('500', '500.0'), ('500.0', '500'), ('500', '500')])
def test_mimics_ids_after_a_merge(tmp_path, capsys, study, labelled):
    table = mimic(tmp_path, study, labelled)
    assert table['No Finding'].fillna(9).tolist() == [1, 9] and table.study.tolist() == ['500', '501']
    assert '1 films of studies without labels' in capsys.readouterr().out


def test_mimics_labels_of_other_studies_are_refused(tmp_path):
    with pytest.raises(DataError, match='none of the 2 films has labels of chexpert'): mimic(tmp_path, '500', 'x')


@pytest.mark.parametrize(
    'agree, message',
    [(4, 'agree=4: give a whole number of 1 to 2'), (0, 'agree=0'), (True, 'agree=True'), (1.5, 'agree=1.5')],
)
def test_vindrs_readers(tmp_path, agree, message):
    (tmp_path / 'train.csv').write_text('image_id,class_name,rad_id\na,Mass ,R1\n a,Mass,R2\nb,No finding,R1\n')
    table = read_table('vindr', tmp_path, exists=False, verbose=False)
    assert labels_of(table) == ['Mass', 'No finding'] and table.Mass.tolist() == [1, 0] and len(table) == 2
    with pytest.raises(DataError, match=message): read_table('vindr', tmp_path, exists=False, agree=agree)


def test_vindrs_marks_without_a_reader_are_refused(tmp_path):
    (tmp_path / 'train.csv').write_text('image_id,class_name,rad_id\na,Mass,R1\na,Mass,\n')
    with pytest.raises(DataError, match=r'not filled in in 1 rows \(row 1\)'): read_table('vindr', tmp_path, exists=False)


def test_nihs_lists(tmp_path, capsys):
    write_films(tmp_path, ['images/a.png', 'images/b c.png'])
    (tmp_path / 'Data_Entry_2017.csv').write_text('Image Index,Finding Labels,Patient ID\na.png,Mass,1\nb c.png,No Finding,2\n')
    (tmp_path / 'test_list.txt').write_text('b c.png\n')
    (tmp_path / 'train_val_list.txt').write_text('other.png\n')
    assert read_table('nih', tmp_path).split.fillna('').tolist() == ['', 'test']
    assert 'train_val_list.txt names none of these films' in capsys.readouterr().out
    (tmp_path / 'train_val_list.txt').write_text('a.png\nb c.png\n')
    with pytest.raises(DataError, match='1 films are in train_val_list.txt and in test_list.txt'): read_table('nih', tmp_path)


def test_a_reader_that_gives_no_table():
    from cxrlg.data import register_reader
    register_reader('nothing')(lambda root: None)
    with pytest.raises(DataError, match="the reader 'nothing' gave NoneType, and no table"): read_table('nothing', '.')


# ---- films of any name

NAMES = st.lists(
    st.text(st.sampled_from('ab\u00e9\u00fc =\'"$'), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
    unique_by=lambda n: film_key(n + '.png'),
)


@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES, st.sampled_from(['NFC', 'NFD']), st.sampled_from(['NFC', 'NFD']))
def test_films_are_found_by_any_spelling(tmp_path_factory, names, on_disk, in_list):
    import unicodedata
    root = tmp_path_factory.mktemp('films')
    for name in names: (root / (unicodedata.normalize(on_disk, name) + '.png')).touch()
    listed = pd.DataFrame(dict(image=[f'./{unicodedata.normalize(in_list, n)}.png ' for n in names], patient='p', Edema=1))
    listed.to_csv(root / 'labels.csv', index=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        table = read_table('csv', root, labels=['Edema'], verbose=False)
    assert len(table) == len(names) and all((root / f).is_file() for f in table.image)


def test_openi_at_full_size(tmp_path):
    xrv = importlib.util.find_spec('torchxrayvision')
    if not xrv: pytest.skip('torchxrayvision is not installed')
    for name in ('NLMCXR_reports.tgz', 'nlmcxr_dicom_metadata.csv.gz'):
        shutil.copy(Path(xrv.origin).parent/'data'/name, tmp_path)
    table = read_table('openi', tmp_path, exists=False, verbose=False)
    assert (len(table), table.patient.nunique(), len(table.attrs['labels'])) == (7470, 3851, 18)
    assert table.image.is_unique and table.view.isin(['PA', 'AP']).sum() > 3000
    assert table.Cardiomegaly.sum() == 493 and table.Granuloma.sum() == 781


def test_openi_without_reports_or_with_a_broken_archive(tmp_path):
    with pytest.raises(DataError, match='NLMCXR_reports.tgz'): read_table('openi', tmp_path)
    (tmp_path/'NLMCXR_reports.tgz').write_bytes(b'no archive')
    with pytest.raises(DataError, match='cannot be read'): read_table('openi', tmp_path)
