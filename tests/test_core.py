"What every room stands on: files whole or absent, locks that end with their process, one line for what a user can mend"
import errno
import fcntl
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logit

from conftest import ROOT
from cxrlg.core import (DataError, LockHeld, atomic_write, check_findings, check_known, check_labels, clip_logit, few, file_lock, film_key,
                        labels_of, new_file, on_disk, parse_yaml, patient_key, printable, process_wide, read_json, read_yaml, repo_root,
                        runs_dir, system_error, walk_files, write_json, writing)


def run(code, *args, **kwargs):
    "A program of its own"
    kwargs = dict(capture_output=True, text=True) | kwargs
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], env=os.environ | dict(PYTHONPATH=str(ROOT)), **kwargs)


# ---- what it costs

def test_core_needs_neither_torch_nor_matplotlib_and_is_quick():
    out = run('''import sys, time, numpy, pandas
start = time.process_time()
import cxrlg.core
print(time.process_time() - start, *[m for m in ('torch', 'matplotlib', 'scipy', 'fastai') if m in sys.modules])''')
    seconds, *heavy = out.stdout.split()
    assert heavy == [] and float(seconds) < .5, out.stderr


def test_core_and_its_lock_work_where_there_is_no_fcntl(tmp_path):
    out = run('''import sys
sys.modules['fcntl'] = None
from cxrlg.core import LockHeld, file_lock
with file_lock(sys.argv[1] + '/lock') as locks: print(locks)
try:
    with file_lock(sys.argv[1] + '/lock', strict=True):
        with file_lock(sys.argv[1] + '/lock', strict=True): print('two inside')
except LockHeld as e: print(e)''', tmp_path)
    assert out.stdout.startswith('False') and 'seems to be used by process' in out.stdout and 'two inside' not in out.stdout, out.stderr
    assert list(tmp_path.iterdir()) == []


# ---- files

def test_atomic_write_keeps_the_old_file(tmp_path):
    path = tmp_path/'a'/'f.txt'
    with atomic_write(path) as tmp: tmp.write_text('old')
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path) as tmp:
            tmp.write_text('ne')
            raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError):
        with atomic_write(path): pass
    assert path.read_text() == 'old' and [o.name for o in path.parent.iterdir()] == ['f.txt']


ERRORS = {
    'full': (OSError(errno.ENOSPC, 'No space left on device'), 'left on device): free some space, or give an out_dir on another disk'),
    'quota': (OSError(errno.EDQUOT, 'Disk quota exceeded'), 'Disk quota exceeded): free some space'),
    'read-only': (OSError(errno.EROFS, 'Read-only file system'), 'Read-only file system): give an out_dir that can be written'),
    'of a library': (RuntimeError('I/O error (os error 28)'), 'No space left on device): free some space'),
    'without a number': (RuntimeError('cannot seek\nin stream'), '(cannot seek): give an out_dir that can be written'),
}


@pytest.mark.parametrize('name', ERRORS)
def test_errors_of_writing_are_one_line(tmp_path, name):
    error, message = ERRORS[name]
    with pytest.raises(DataError) as e:
        with new_file(tmp_path/'f'): raise error
    assert message in str(e.value) and '\n' not in str(e.value) and list(tmp_path.iterdir()) == []


def test_the_error_behind_an_error_is_found():
    outer = RuntimeError('cannot save')
    outer.__cause__ = OSError(errno.ENOSPC, 'full')
    assert system_error(outer) == (errno.ENOSPC, 'full') and system_error(ValueError('x')) == (None, '')


def test_other_errors_pass_through_writing():
    with pytest.raises(KeyError):
        with writing('f'): raise KeyError('x')


def test_json_that_says_nothing(tmp_path):
    (tmp_path/'half').write_text('{"key"')
    (tmp_path/'list').write_text('[1]')
    (tmp_path/'bytes').write_bytes(b'\xff\xfe')
    assert [read_json(tmp_path/name) for name in ('half', 'list', 'bytes', 'nowhere')] == [{}]*4
    write_json(tmp_path/'a'/'whole', dict(fold=1), indent=1)
    assert read_json(tmp_path/'a'/'whole') == dict(fold=1)


# ---- locks

HOLD = '''import sys, time
from cxrlg.core import file_lock
with file_lock(sys.argv[1]):
    print('in', flush=True)
    time.sleep(600)'''


@pytest.fixture
def holder(tmp_path):
    "Another process that holds the lock in the folder"
    args = [sys.executable, '-c', HOLD, str(tmp_path/'lock')]
    p = subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert p.stdout.readline() == 'in\n'
    yield p
    p.kill()
    p.wait()


def enter(path, **options):
    with file_lock(path, **options) as locks: return locks


def test_who_holds_it_is_told(tmp_path, holder):
    name = f'process {holder.pid} on {socket.gethostname()}'
    with pytest.raises(LockHeld) as e: enter(tmp_path/'lock', wait=0, doing='trained', what='fold 3')
    assert str(e.value) == f'fold 3 is being trained by {name}: wait for it, or stop it' and e.value.holder == name
    assert sorted(os.listdir(tmp_path)) == ['lock', 'lock.holder']
    again = pickle.loads(pickle.dumps(e.value))
    assert again.holder == name and str(again) == str(e.value)


def test_a_killed_ones_lock_is_free_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert sorted(os.listdir(tmp_path)) == ['lock', 'lock.holder']
    start = time.monotonic()
    assert enter(tmp_path/'lock', wait=0) is True
    assert time.monotonic() - start < 1 and os.listdir(tmp_path) == []


def test_waiting_ends(tmp_path, holder):
    start = time.monotonic()
    with pytest.raises(LockHeld): enter(tmp_path/'lock', wait=.5)
    assert .4 < time.monotonic() - start < 20
    threading.Timer(.5, holder.kill).start()
    assert enter(tmp_path/'lock') is True


def test_an_error_inside_gives_it_back(tmp_path):
    with pytest.raises(KeyError):
        with file_lock(tmp_path/'lock'): raise KeyError('x')
    assert enter(tmp_path/'lock', wait=0) is True


def test_a_folder_that_cannot_be_made(tmp_path):
    assert enter(tmp_path/'a'/'b'/'lock', wait=0) is True
    (tmp_path/'file').touch()
    with pytest.raises(OSError): enter(tmp_path/'file'/'lock', wait=0)


@pytest.fixture
def no_locks(monkeypatch):
    "A file system without locks"
    def flock(*args): raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, 'flock', flock)


HOLDERS = {
    'nobody': (None, True),
    'empty': ('', True),
    'no process': ('somebody', True),
    'an ended process here': (f'process 4194999 on {socket.gethostname()}', True),
    'a process here': (f'process {os.getpid()} on {socket.gethostname()}', False),
    'another host': ('process 1 on some-other-host', False),
}


@pytest.mark.parametrize('name', HOLDERS)
def test_without_locks_the_holders_file_decides(tmp_path, no_locks, name):
    text, free = HOLDERS[name]
    if text is not None: (tmp_path/'lock.holder').write_text(text)
    if free: assert enter(tmp_path/'lock', strict=True) is False
    else:
        message = f'seems to be used by {text}.*no locks.*remove .*lock.holder'
        with pytest.raises(LockHeld, match=message): enter(tmp_path/'lock', strict=True)
    assert enter(tmp_path/'lock') is False


def test_one_at_a_time_whatever_the_hurry(tmp_path):
    "Locks are taken and given back as fast as can be: never are two inside"
    inside, taken, wrong = [], [], []
    def hurry():
        end = time.monotonic() + 10
        while len(taken) < 300 and time.monotonic() < end:
            with file_lock(tmp_path/'lock'):
                inside.append(1)
                if len(inside) > 1: wrong.append(1)
                taken.append(1)
                time.sleep(0)
                inside.pop()
    threads = [threading.Thread(target=hurry) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong and len(taken) >= 50 and os.listdir(tmp_path) == []


def test_many_processes_count_without_a_loss(tmp_path):
    (tmp_path/'n').write_text('0')
    code = '''import sys
from pathlib import Path
from cxrlg.core import file_lock
n = Path(sys.argv[1])/'n'
for _ in range(20):
    with file_lock(Path(sys.argv[1])/'lock'): n.write_text(str(int(n.read_text()) + 1))'''
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    running = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], env=environment) for _ in range(3)]
    assert [p.wait() for p in running] == [0, 0, 0] and (tmp_path/'n').read_text() == '60'
    assert os.listdir(tmp_path) == ['n']


# ---- settings of the process

def test_the_last_thread_that_leaves_sets_back():
    setting = dict(k=0)
    one = process_wide(lambda: dict(setting), setting.update, dict(k=1))
    with one:
        with one: pass
        assert setting['k'] == 1
    assert setting['k'] == 0


# ---- names, labels, folders

def test_unknown_names():
    check_known([], ['Edema'])
    check_known(['Edema'], iter(['Edema', 'Mass']))
    for name, say in {'epoch': "no parameter 'epoch'; did you mean 'epochs'", None: "no parameter None; there are: 'epochs', 'lr'"}.items():
        with pytest.raises(DataError, match=say): check_known([name], ['epochs', 'lr'], 'parameter')


def test_findings_survive_a_mask_and_are_asked_for_after_a_merge():
    table = pd.DataFrame(dict(image=['a'], patient=['p'], Edema=[1.], Mass=[0.]))
    table.attrs['labels'] = ['Mass']
    assert labels_of(table[table.Edema == 1].reset_index(drop=True)) == ['Mass']
    merged = table.merge(pd.DataFrame(dict(image=['a'], portable=[1.])), on='image')
    with pytest.raises(DataError, match='columns that may be: Edema, Mass, portable'): labels_of(merged)
    refused = {'Masses': 'lacks finding columns: Masses', 'patient': "'patient' cannot be a finding", 'macro': 'the mean of all'}
    for labels, message in refused.items():
        table.attrs['labels'] = ['Mass', labels]
        with pytest.raises(DataError, match=message): labels_of(table)


@pytest.mark.parametrize('names', [['A', 'A'], ['Mass', 'mass '], ['A', 'age'], ['A', 3], ['A', ' '], ['\u00e9', 'e\u0301']])
def test_findings_that_cannot_be_meant(names):
    with pytest.raises(DataError, match='finding') as e: check_findings(names)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('kind', ['Float64', 'Int64', 'boolean', 'double[pyarrow]', 'object'])
def test_labels_of_any_type_with_NA(kind):
    y, names = check_labels(pd.DataFrame(dict(A=pd.array([1, None, 0], dtype=kind), B=[0., 1., np.nan])))
    assert names == ['A', 'B'] and np.array_equal(y, [[1, 0], [np.nan, 1], [0, np.nan]], equal_nan=True)
    assert np.array_equal(check_labels(np.array([[1, pd.NA]], dtype=object))[0], [[1, np.nan]], equal_nan=True)


# ---- one name for one film, and for one patient

PATHS = st.lists(st.sampled_from(['a', 'b', '\u00e9', 'e\u0301', ' ', '/', '.', '\u00a0', '=']), max_size=12).map(''.join)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(PATHS)
def test_a_key_is_its_own_key_and_no_spelling_changes_it(path):
    key = film_key(path)
    assert film_key(key) == key == film_key(unicodedata.normalize('NFD', path))
    assert film_key(f'./{path}') == key or path.lstrip().startswith('/')
    assert film_key(f' {path} ') == film_key(path.replace('/', '//')) == key or path.lstrip().startswith('/')
    assert key.isascii() or unicodedata.is_normalized('NFC', key)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.integers(0, 10**40), st.integers(0, 6), st.integers(0, 4))
def test_a_number_is_one_patient_however_it_is_written(n, zeros, decimals):
    key = patient_key(str(n))
    assert patient_key('0'*zeros + str(n)) == key and patient_key(f'{n}.' + '0'*decimals) == key and patient_key(f'+{n}') == key
    assert patient_key(f'{n}e{zeros}') == patient_key(f'{n}' + '0'*zeros) and patient_key(str(n + 1)) != key


@pytest.mark.parametrize(
    'written, meant',
    [
        ('p1\u200b', 'p1'),
        ('\ufeffp1', 'p1'),
        ('p\xad1 \u200e', 'P1'),
        ('12\0', '12'),
        ('a\u20131', 'a-1'),
        ('a\u22121', 'a-1'),
        ('="0012"', '12'),
        ("'12", '12'),
        ('"p1"', 'p1'),
        ('a\tb', 'a b'),
    ],
)
def test_what_nobody_sees_of_an_id_makes_no_other_patient(written, meant): assert patient_key(written) == patient_key(meant)


def test_ids_that_are_no_numbers_are_kept_apart():
    ids = ['1.2.840.1', 'p1', 'p2', 'p01', '-7', '7', '1_000', '1,000', '1000', 'NA', 'inf', 'nan', '', '.', '0x10', '12e9999999']
    assert len(set(map(patient_key, ids))) == len(ids)
    assert (
        patient_key('P1 ') == patient_key('p1')
        and patient_key('\uff11\uff12') == patient_key('12.0')
        and patient_key('.50') == patient_key('0.5')
    )


def test_a_file_is_found_however_the_disk_spells_it(tmp_path):
    folder = tmp_path/'Mu\u0308ller'
    folder.mkdir()
    for name in ('e\u0301.png', 'a.png', 'b.png ', 'o\u0302.png', '\u00f4.png'): (folder/name).touch()
    seen = {}
    def found(name): return on_disk(f'{tmp_path}/M\u00fcller/{name}', seen)
    assert found('\u00e9.png') == f'{folder}/e\u0301.png' and found('a.png') == f'{folder}/a.png' and found('b.png') == f'{folder}/b.png '
    assert found('c.png') is None and found('o\u0302 .png') is None and on_disk('nowhere/a.png') is None
    assert len(seen) == 2


# ---- YAML

YAML = {
    'a: 1\nb: 2\na: 3': 'line 3 is not valid YAML: a is given twice',
    'x: {lr: 1, lr: 1}': 'lr is given twice',
    '"a": 1\na: 2': 'a is given twice',
    'n: 0100': "0100 may be meant in base 8 or 10: write it without the 0 in front, or '0100' in quotes",
    'n: [1, 08]': '08 may be meant in base 8',
    'n: -010': '-010 may be meant in base 8',
    'n: 1:30': "1:30 would be read in base 60: write '1:30' in quotes",
    'a: b: c': 'line 1 is not valid YAML: mapping values are not allowed here',
    '!!python/object/apply:os.system [ls]': 'could not determine a constructor',
    '['*5000: 'nested too deeply',
    'a: \x01': 'special characters are not allowed',
    'a: 1\nd: 2020-13-45': 'line 2 is not valid YAML: 2020-13-45 is no timestamp: correct it, or put it in quotes',
    'a: !!int x': 'line 1 is not valid YAML: x is no int',
    'a: !!int ""': 'is no int',
    'a: !!bool x': 'x is no bool',
    'a: !!timestamp x': 'x is no timestamp',
    'a:\n  b: ' + '9' * 5000: 'line 2 is not valid YAML: 9999999999999999999999999999999999999999 is no int',
    '1: x\n1.0: y': 'line 2 is not valid YAML: 1.0 is the same name as 1: keep one',
    'yes: x\ntrue: y': 'true is the same name as yes',
    '~: x\nnull: y': 'null is the same name as ~',
    'yes: x\n1: y': '1 is the same name as yes',
}


@pytest.mark.parametrize('text', YAML)
def test_yaml_that_cannot_be_meant(text, tmp_path):
    (tmp_path/'a.yaml').write_text(text)
    with pytest.raises(DataError) as e: read_yaml(tmp_path/'a.yaml')
    assert YAML[text] in str(e.value) and 'a.yaml' in str(e.value) and '\n' not in str(e.value)


def test_yaml_that_is_meant(tmp_path):
    assert parse_yaml('a: &a {<<: &b {1: x}, 2: y}\nb: {<<: [*a, *b], 1: z}\n"1": s\n1: n\nd: 2020-12-05', 'here')['b'] == {1: 'z', 2: 'y'}
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nid: '007'\nlr: 1e-3\nzero: 0\nhalf: 0.5\nname: 1:30 pm\nhex: 0x1f\nversion: 1.0.0\n"
    (tmp_path/'a.yaml').write_bytes(b'\xef\xbb\xbf' + text.encode())
    assert read_yaml(tmp_path / 'a.yaml') == dict(
        a=dict(x=1, y=2), b=dict(x=1, y=3), id='007', lr=1e-3, zero=0, half=0.5, name='1:30 pm', hex=31, version='1.0.0'
    )
    with pytest.raises(DataError, match='there is no configuration .*nowhere.yaml'): read_yaml(tmp_path/'nowhere.yaml', 'configuration')
    (tmp_path/'latin.yaml').write_bytes('study: M\u00fcller'.encode('latin-1'))
    with pytest.raises(DataError, match='is not UTF-8 text'): read_yaml(tmp_path/'latin.yaml')
    with pytest.raises(DataError, match='cannot be read'): read_yaml(tmp_path)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.dictionaries(
        st.text(st.characters(codec='utf-8', exclude_categories=['Cc', 'Cs']), min_size=1, max_size=8),
        st.one_of(
            st.integers(),
            st.floats(allow_nan=False, allow_infinity=False),
            st.booleans(),
            st.none(),
            st.text('0189:e.-', max_size=6),
        ),
        max_size=5,
    )
)
def test_what_yaml_wrote_is_read_as_it_was(content):
    assert parse_yaml(yaml.safe_dump(content, allow_unicode=True), 'here') == content


# ---- what a command says

def test_names_in_messages_stay_on_one_line():
    assert few(['a\nb', '\x1b[31m', 'plain  name.png']) == 'a b, \\x1b[31m, plain  name.png' and printable('\udce9') == '\\udce9'


LABELS = {
    'one dimension': ([0, 1], r'shape \(2,\)'),
    'no label': (np.zeros((3, 0)), 'two dimensions'),
    'text': ([['1', 'yes']], "'yes' in row 0, label 1"),
    'two': (pd.DataFrame(dict(Edema=[0, 2])), 'the first is 2 in row 1, Edema'),
    'infinite': (np.array([[0., np.inf]]), 'the first is inf in row 0, label 1'),
}


@pytest.mark.parametrize('name', LABELS)
def test_wrong_labels(name):
    y, message = LABELS[name]
    with pytest.raises(DataError, match=message): check_labels(y)


def test_clip_logit_is_scipys_inside():
    p = np.linspace(.01, .99, 99)
    assert (clip_logit(p) == logit(p)).all() and np.isfinite(clip_logit([0, 1])).all()
    assert clip_logit(np.float32(1)) == logit(1 - 1e-12)


def test_linked_folders_are_entered_once(tmp_path):
    films = tmp_path/'films'
    (films/'a').mkdir(parents=True)
    for name in ('x.png', 'a/y.JPG', 'a/.hidden.png', 'a/notes.txt'): (films/name).touch()
    (films/'a'/'loop').symlink_to(films, target_is_directory=True)
    (films/'b').symlink_to(films/'a', target_is_directory=True)
    assert walk_files(films, ('.png', '.jpg')) == ['a/y.JPG', 'x.png']
    assert walk_files(films, ('.png', '.jpg'), ['b', 'a']) == ['a/loop/x.png', 'a/y.JPG']
    (films/'Alias').symlink_to(films/'a', target_is_directory=True)
    assert walk_files(films, ('.png', '.jpg')) == ['a/y.JPG', 'x.png']
    assert walk_files(films/'nowhere', ('.png',)) == []


def test_where_studies_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT/'nbs')
    monkeypatch.delenv('CXRLG_RUNS', raising=False)
    assert repo_root() == ROOT and runs_dir() == ROOT/'runs' and runs_dir('x') == Path('x')
    monkeypatch.setenv('CXRLG_RUNS', str(tmp_path))
    assert runs_dir() == tmp_path


def test_what_is_no_file_is_never_replaced_by_one(tmp_path):
    os.mkfifo(tmp_path/'pipe')
    for place, what in ((tmp_path/'pipe', 'a device or a pipe'), (tmp_path, 'a folder')):
        for write in (atomic_write, new_file):
            with pytest.raises(DataError, match=f'is {what}, no file: name another file'):
                with write(place) as tmp: tmp.touch()
    assert (tmp_path/'pipe').is_fifo() and os.listdir(tmp_path) == ['pipe']
