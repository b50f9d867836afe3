"A study end to end: what is refused before anything runs, what a failing fold does to the others, and what the second call does."
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from conftest import ROOT
from cxrlg.data import DataError
from cxrlg.study import read_config, run_study

TINY = dict(study='tiny', arms=['none'], data_args={'n_patients': 40}, size=32, n_splits=2, arch='test_resnet', arch_args={}, epochs=1, bs=8, threads=1)


def command(*args, **env):
    "The command as a user calls it: exit status, standard output, lines of standard error without warnings"
    run = subprocess.run([Path(sys.executable).parent/'cxrlg_study', *map(str, args)], cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(PYTHONWARNINGS='ignore') | env)
    return run.returncode, run.stdout, run.stderr


@pytest.fixture
def config(tmp_path):
    import yaml
    (tmp_path/'tiny.yaml').write_text(yaml.safe_dump(TINY | {'out_dir': str(tmp_path/'runs')}))
    return tmp_path/'tiny.yaml'


def test_a_failing_fold_is_named_and_the_others_go_on(config, tmp_path):
    broken = tmp_path/'runs'/'tiny'/'none'/'seed42'/'fold1'
    broken.mkdir(parents=True)
    (broken/'checkpoint.pt').write_bytes(b'no checkpoint')
    status, out, err = command(config, '--n_boot', 50)
    assert status == 1
    assert '05_train.ipynb, cell' in err and 'checkpoint.pt is damaged' in err and '1 of 2 folds failed' in err
    assert (tmp_path/'runs'/'tiny'/'none'/'seed42'/'fold0'/'done.json').is_file() and not (broken/'done.json').exists()

    (broken/'checkpoint.pt').unlink()
    stamp = (tmp_path/'runs'/'tiny'/'none'/'seed42'/'fold0'/'done.json').stat().st_mtime_ns
    status, out, err = command(config, '--n_boot', 50)
    assert status == 0, err
    assert 'report.html' in out and 'fold1' in out
    assert (tmp_path/'runs'/'tiny'/'none'/'seed42'/'fold0'/'done.json').stat().st_mtime_ns == stamp
    results = pd.read_csv(tmp_path/'runs'/'tiny'/'results.csv')
    done = [json.loads((tmp_path/'runs'/'tiny'/'none'/'seed42'/f'fold{k}'/'done.json').read_text())['auc'] for k in (0, 1)]
    assert results[['fold0', 'fold1']].iloc[0].tolist() == pytest.approx(done, abs=1e-6)
    assert 'phantom' in (tmp_path/'runs'/'tiny'/'report.html').read_text()


@pytest.mark.parametrize('change,says', [
    (dict(epoch=2), "did you mean 'epochs'"), (dict(arms=['none', 'lasso']), 'none, l1, prox'), (dict(folds=[0, 2]), 'the folds are 0 to 1'),
    (dict(data='csv', data_dir='no/such/folder'), 'no/such/folder'), (dict(arch='test_resnt'), 'test_resnet'), (dict(epochs='three'), 'whole number'),
    (dict(n_splits=41), '40 patients'), (dict(arms=[]), 'arms'), (dict(seeds=['x']), 'seed')])
def test_refused_before_anything_runs(tmp_path, change, says):
    with pytest.raises(DataError, match=says) as e: run_study(TINY | change, out_dir=str(tmp_path), bar=False)
    assert '\n' not in str(e.value)
    assert not list(tmp_path.rglob('*.ipynb'))


def test_the_command_refuses_in_one_line(tmp_path):
    status, out, err = command(tmp_path/'missing.yaml')
    assert status == 2 and out == '' and err.strip().splitlines()[-1].startswith('cxrlg_study: there is no configuration')
    (tmp_path/'bad.yaml').write_text('study: [1\n')
    with pytest.raises(DataError, match='not valid YAML'): read_config(tmp_path/'bad.yaml')
    (tmp_path/'list.yaml').write_text('- a\n- b\n')
    with pytest.raises(DataError, match='not a mapping'): read_config(tmp_path/'list.yaml')
