"The house rules: floors of imports, parameters, notebooks in sync and clean, nothing of this machine in what is committed."
import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest
import yaml

from conftest import ROOT
from run_notebooks import code_hash

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
LIBRARY = [nb for nb in NOTEBOOKS if nb.name < '20']
FLOORS = [{'data', 'splits', 'asl', 'graph'}, {'phantom', 'model'}, {'eval'}, {'train', 'controls'}, {'study'}, {'predict'}, {'localise'}]


def floor(room): return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def imports(path):
    "The rooms of cxrlg that a module imports"
    names = [n for node in ast.walk(ast.parse(path.read_text())) for n in
             ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ''] if isinstance(node, ast.ImportFrom) else [])]
    return {n.split('.')[1] for n in names if n.startswith('cxrlg.')}


@pytest.mark.parametrize('path', sorted(p for p in (ROOT/'cxrlg').glob('*.py') if not p.stem.startswith('_')), ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    for other in imports(path): assert floor(other) < floor(path.stem), f'{path.stem} imports {other}, which is not on a lower floor'


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the sources, so that the gates can run without touching the checkout"
    dst = tmp_path_factory.mktemp('copy')
    for name in ('nbs', 'cxrlg', 'images', 'settings.ini', '_quarto.yml', 'README.md'):
        (shutil.copytree if (ROOT/name).is_dir() else shutil.copy)(ROOT/name, dst/name, **({'symlinks': True} if (ROOT/name).is_dir() else {}))
    return dst


def files(folder, *patterns): return {p.relative_to(folder): p.read_bytes() for pat in patterns for p in folder.glob(pat)}


@pytest.mark.parametrize('gate', ['nbdev_export', 'nbdev_clean'])
def test_gate_changes_nothing(copy, gate):
    before = files(copy, 'nbs/*.ipynb', 'cxrlg/*.py')
    subprocess.run([Path(sys.executable).parent/gate], cwd=copy, check=True)
    after = files(copy, 'nbs/*.ipynb', 'cxrlg/*.py')
    assert sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k)) == []


def test_the_parameters_cells_are_tagged():
    for name in ('05_train', '06_eval'):
        tags = [c.metadata.get('tags') for c in nbformat.read(ROOT/'nbs'/f'{name}.ipynb', 4).cells]
        assert tags.count(['parameters']) == 1, name


def test_the_parameters_cell_and_TrainConfig_agree():
    from papermill import inspect_notebook

    from cxrlg.train import TrainConfig
    cell = {k: eval(v['default']) for k, v in inspect_notebook(str(ROOT/'nbs'/'05_train.ipynb')).items()}
    assert list(cell) == [f.name for f in fields(TrainConfig)]
    assert TrainConfig(**cell) == TrainConfig()


def test_the_papermill_notebooks_need_only_what_the_package_installs():
    for name in ('05_train', '06_eval'): assert 'nbdev' not in ''.join(c.source for c in nbformat.read(ROOT/'nbs'/f'{name}.ipynb', 4).cells if c.cell_type == 'code')


@pytest.mark.parametrize('path', sorted((ROOT/'configs').glob('*.yaml')), ids=lambda p: p.stem)
def test_every_config_is_understood(path):
    from cxrlg.study import expand, read_config
    jobs = expand(read_config(path))
    assert jobs and jobs[0].study == yaml.safe_load(path.read_text())['study']


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_opens_with_a_claim_and_has_its_outputs(nb):
    cells = nbformat.read(nb, 4).cells
    assert re.match(r'# .+\n\n> .+', cells[0].source), 'the first cell is a title and one claim'
    outputs = [o for c in cells for o in c.get('outputs', [])]
    assert any('image/png' in o.get('data', {}) or 'image/svg+xml' in o.get('data', {}) for o in outputs), 'no picture is saved'
    assert not [o for o in outputs if o.output_type == 'error' or o.get('name') == 'stderr']


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)
def test_saved_outputs_are_of_the_code_beside_them(nb):
    nb = nbformat.read(nb, 4)
    assert nb.metadata.get('cxrlg', {}).get('outputs_of') == code_hash(nb), 'its code changed after its outputs were saved: make notebooks NB=... runs it again'


def tracked():
    "Text files of the repository"
    out = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT/f for f in out.split('\n') if f and (ROOT/f).is_file()]


def test_nothing_speaks_of_a_machine():
    places = re.compile(r'/(?:root|work|home/\w+|Users/\w+|tmp)/|\bfile:///|https?://[\w.:-]*(?:pypi|index|proxy)[\w.:-]*/simple')
    bad = {f.relative_to(ROOT).as_posix(): m.group() for f in tracked() if f.name != Path(__file__).name
           and f.suffix not in {'.png', '.npz', '.parquet'} and (m := places.search(f.read_text(errors='replace')))}
    assert bad == {}


def test_lock_pins_everything_that_setup_asks_for():
    cfg = configparser.ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini')
    wanted = {re.match(r'[\w-]+', r).group().lower().replace('_', '-') for k in ('requirements', 'dev_requirements', 'dicom_requirements', 'dask_requirements', 'onnx_requirements') for r in cfg['DEFAULT'][k].split()}
    lines = [l for l in (ROOT/'requirements.lock').read_text().splitlines() if l and not l.startswith(('#', ' '))]
    assert all(re.match(r'[\w.-]+==\S+', l) for l in lines)
    assert wanted <= {re.match(r'[\w.-]+', l).group().lower() for l in lines}


def test_the_site_has_no_broken_link(tmp_path):
    for name in ('nbs', 'images'): shutil.copytree(ROOT/name, tmp_path/name, symlinks=True)
    for name in ('_quarto.yml', 'README.md'): shutil.copy(ROOT/name, tmp_path/name)
    out = subprocess.run([Path(sys.executable).parent/'smalldocs', 'check', 'nbs'], cwd=tmp_path, capture_output=True, text=True)
    assert [line for line in out.stdout.splitlines() if 'link' in line] == [] and ' page(s)' in out.stdout + out.stderr


@pytest.mark.skipif(not shutil.which('quarto'), reason='Quarto is not on the PATH')
def test_quarto_renders_the_site(copy):
    subprocess.run([Path(sys.executable).parent/'nbdev_docs'], cwd=copy, check=True)
    pages = {p.stem for p in (copy/'_docs').glob('*.html')}
    assert {nb.stem for nb in NOTEBOOKS} | {p.stem for p in (ROOT/'nbs').glob('*.qmd')} <= pages
