"The house rules: floors of imports, parameters, notebooks in sync and clean, nothing of this machine in what is committed."
import ast
import configparser
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest
import yaml

from conftest import ROOT
from cxrlg._pages import parameter_rows, public_names
from cxrlg.results import FileIn, FoldFolder, StudyFolder
from run_notebooks import code_hash

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
LIBRARY = [nb for nb in NOTEBOOKS if nb.name < '20']
FLOORS = [
    {'answers', 'core', 'label_values'},
    {'label_files', 'readers'},
    {'data', 'pictures', 'dicom', 'films', 'phantom', 'splits', 'asl', 'graph', 'tree', 'checks', 'delong', 'eval'},
    {'batches', 'model', 'maps', 'features', 'convex', 'couplings', 'stability', 'calibration', 'decisions', 'recalibration', 'power',
     'headroom', 'evidence', 'sheets'},
    {'callbacks', 'trackers', 'programs', 'replicates', 'results', 'verdicts', 'tables', 'corrections', 'kept', 'predictions', 'units',
     'figures', 'ensembles', 'submissions'},
    {'config', 'learner', 'engines'},
    {'train', 'controls', 'report'},
    {'study', 'predict', 'evaluate'},
    {'ablation', 'localise', 'export', 'validate'},
    {'commands'},
]
PAGES = {room: nb.stem for nb in LIBRARY for room in re.findall(r'default_exp (\w+)', nb.read_text())}


def floor(room):
    "Floor and name of a room's notebook: imports go to what is smaller"
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms), PAGES[room]


def test_the_map_names_the_floor_of_each_room():
    rows = re.findall(r'^\| (\d) \| `(\w+)` \|', (ROOT/'nbs'/'house.qmd').read_text(), flags=re.M)
    assert {(int(n), room) for n, room in rows} == {(n, room) for n, rooms in enumerate(FLOORS) for room in rooms}


def imports(path):
    "The rooms of cxrlg that a module imports"
    names = [
        n
        for node in ast.walk(ast.parse(path.read_text()))
        for n in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else ['cxrlg.' * node.level + (node.module or '')] if isinstance(node, ast.ImportFrom) else []
        )
    ]
    return {n.split('.')[1] for n in names if n.startswith('cxrlg.')}


def test_imports_are_seen():
    assert {'train', 'model'} <= imports(ROOT/'cxrlg'/'study.py') and {'splits', 'model'} <= imports(ROOT/'cxrlg'/'train.py')


@pytest.mark.parametrize('path', sorted(p for p in (ROOT/'cxrlg').glob('*.py') if not p.stem.startswith('_')), ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    for other in imports(path):
        assert floor(other) < floor(
            path.stem
        ), f'{path.stem} imports {other}, which is neither on a lower floor nor on a page before it'


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the sources, so that the gates can run without touching the checkout"
    dst = tmp_path_factory.mktemp('copy')
    for name in ('nbs', 'cxrlg', 'images', 'settings.ini', '_quarto.yml', 'README.md'):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(
            ROOT / name, dst / name, **({'symlinks': True} if (ROOT / name).is_dir() else {})
        )
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

    from cxrlg.config import TrainConfig
    cell = {k: eval(v['default']) for k, v in inspect_notebook(str(ROOT/'nbs'/'05_train.ipynb')).items()}
    assert list(cell) == [f.name for f in fields(TrainConfig)]
    assert TrainConfig(**cell) == TrainConfig()


def test_the_papermill_notebooks_need_only_what_the_package_installs():
    for name in ('05_train', '06_eval'):
        assert 'nbdev' not in ''.join(
            c.source for c in nbformat.read(ROOT / 'nbs' / f'{name}.ipynb', 4).cells if c.cell_type == 'code'
        )


@pytest.mark.parametrize('path', sorted((ROOT/'configs').glob('*.yaml')), ids=lambda p: p.stem)
def test_every_config_is_understood(path):
    from cxrlg.ablation import read_ablation
    from cxrlg.study import expand, read_config
    written = yaml.safe_load(path.read_text())
    if 'variants' in written:
        assert all(list(variants) == ['full', *written['variants']] for variants in read_ablation(path).values())
        return
    if isinstance(written.get('uncertain'), list):
        assert list(read_ablation(path)[written['study']]) == ['full', *written['uncertain'][1:]]
        return
    jobs = expand(read_config(path))
    assert jobs and jobs[0].study == written['study']


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_opens_with_a_claim_and_has_its_outputs(nb):
    cells = nbformat.read(nb, 4).cells
    assert re.match(r'# .+\n\n> .+', cells[0].source), 'the first cell is a title and one claim'
    outputs = [o for c in cells for o in c.get('outputs', [])]
    assert any('image/png' in o.get('data', {}) or 'image/svg+xml' in o.get('data', {}) for o in outputs), 'no picture is saved'
    assert not [o for o in outputs if o.output_type == 'error' or o.get('name') == 'stderr']


def imports_and_more(source):
    "Does a cell import and do something else? Only the whole statements of the cell count, not what stands within them"
    python = re.sub(r'^%.*', '', source, flags=re.M)
    kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(python).body}
    return kinds == {True, False}


def test_a_cell_that_imports_and_does_more_is_seen():
    assert imports_and_more('import os\nos.getcwd()')
    assert not imports_and_more('import os') and not imports_and_more('if called:\n    import os')


@pytest.mark.parametrize('nb', LIBRARY, ids=lambda p: p.stem)
def test_imports_have_cells_of_their_own(nb):
    "nbdev runs a cell with an import when it makes the page, and nothing of the page before it"
    cells = [c for c in nbformat.read(nb, 4).cells if c.cell_type == 'code' and not re.match(r'#\| *export', c.source)]
    assert not [c.source for c in cells if imports_and_more(c.source)]


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)
def test_saved_outputs_are_of_the_code_beside_them(nb):
    nb = nbformat.read(nb, 4)
    assert nb.metadata.get('cxrlg', {}).get('outputs_of') == code_hash(
        nb
    ), 'its code changed after its outputs were saved: make notebooks NB=... runs it again'


def tracked():
    "Text files of the repository"
    out = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT/f for f in out.split('\n') if f and (ROOT/f).is_file()]


def test_nothing_speaks_of_a_machine():
    places = re.compile(r'/(?:root|work|home/\w+|Users/\w+|tmp)/|\bfile:///|https?://[\w.:-]*(?:pypi|index|proxy)[\w.:-]*/simple')
    texts = [f for f in tracked() if f.name != Path(__file__).name and f.suffix not in {'.png', '.npz', '.parquet'}]
    found = {f.relative_to(ROOT).as_posix(): places.search(f.read_text(errors='replace')) for f in texts}
    assert {name: m.group() for name, m in found.items() if m} == {}


def test_lock_pins_everything_that_setup_asks_for():
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(ROOT / 'settings.ini')
    wanted = {
        re.match(r'[\w-]+', r).group().lower().replace('_', '-')
        for k in ('requirements', 'dev_requirements', 'dicom_requirements', 'dask_requirements', 'onnx_requirements')
        for r in cfg['DEFAULT'][k].split()
    }
    lines = [l for l in (ROOT/'requirements.lock').read_text().splitlines() if l and not l.startswith(('#', ' '))]
    assert all(re.match(r'[\w.-]+==\S+', l) for l in lines)
    assert wanted <= {re.match(r'[\w.-]+', l).group().lower() for l in lines}


def test_the_site_has_no_broken_link(tmp_path):
    for name in ('nbs', 'images'): shutil.copytree(ROOT/name, tmp_path/name, symlinks=True)
    for name in ('_quarto.yml', 'README.md'): shutil.copy(ROOT/name, tmp_path/name)
    out = subprocess.run([Path(sys.executable).parent/'smalldocs', 'check', 'nbs'], cwd=tmp_path, capture_output=True, text=True)
    assert [line for line in out.stdout.splitlines() if 'link' in line] == [] and ' page(s)' in out.stdout + out.stderr


def pages():
    "The names that the site's pages will have: nbdev drops the number in front of a notebook's"
    named = [re.sub(r'^\d+[a-zA-Z0-9]*_', '', nb.stem.lower()) for nb in NOTEBOOKS] + [p.stem for p in (ROOT/'nbs').glob('*.qmd')]
    assert len(set(named)) == len(named), 'two sources would be one page'
    return set(named)


def test_links_to_the_site_name_its_pages():
    texts = [f for f in tracked() if f.suffix in {'.md', '.qmd', '.ipynb', '.py', '.yaml', '.cff', '.ini'}]
    found = {(f.name, name) for f in texts for name in re.findall(r'cxrlg\.github\.io/cxrlg/([\w.-]+)\.html', f.read_text())}
    assert found and {name for _, name in found} <= pages(), found


def hrefs(entries):
    "The pages that a part of the navigation lists, those of its sections among them"
    return [page for e in entries for page in ([e] if isinstance(e, str) else hrefs(e['contents']) if 'contents' in e else [e['href']])]


def test_every_page_is_in_the_navigation():
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text())['website']
    listed = hrefs(site['sidebar']['contents'])
    assert len(set(listed)) == len(listed)
    assert set(listed) == {p.name for p in (ROOT/'nbs').glob('*') if p.suffix in {'.ipynb', '.qmd'}}
    assert set(hrefs(site['navbar']['left'])) <= set(listed)
    assert [e['section'] for e in site['sidebar']['contents']] == ['Start', 'Evidence', 'Library', 'Benchmarks', 'Reporting']


def test_every_picture_has_a_caption_and_a_text_for_those_who_do_not_see_it():
    for nb in NOTEBOOKS:
        for c in nbformat.read(nb, 4).cells:
            if not any('image/png' in o.get('data', {}) for o in c.get('outputs', [])): continue
            for key in ('label: fig-', 'fig-cap: "', 'fig-alt: "'): assert f'#| {key}' in c.source, f'{nb.name}, {c.id}: no {key}'
            assert len([o for o in c.outputs if 'data' in o]) == 1, f'{nb.name}, {c.id}: a labelled picture stands alone in its cell'


def test_citations_are_in_the_bibliography_and_all_of_it_is_cited():
    keys = set(re.findall(r'^@\w+\{(\w+),', (ROOT/'nbs'/'references.bib').read_text(), flags=re.M))
    cited = {k for p in (ROOT/'nbs').glob('*.qmd') for k in re.findall(r'(?<![\w.])@(\w+\d{4})\b', p.read_text())}
    assert cited == keys


def sources():
    "Name and Markdown of every page: text, and the cells of notebooks"
    for p in sorted((ROOT/'nbs').glob('*.qmd')): yield p.name, p.read_text()
    for nb in NOTEBOOKS: yield nb.name, '\n'.join(c.source for c in nbformat.read(nb, 4).cells)


def test_cross_references_have_their_targets():
    for name, text in sources():
        there = set(re.findall(r'^#\| label: (\S+)', text, flags=re.M)) | set(re.findall(r'\{#([\w-]+)', text))
        assert set(re.findall(r'(?<![\w`])@((?:fig|eq|sec|tbl)-[\w-]+)', text)) <= there, name


def test_the_site_is_prepared_for_quarto(copy, tmp_path):
    "nbdev's part of `make docs`, with a stand-in where Quarto would be called: every page and picture lies where Quarto reads it"
    stand_in = tmp_path/'quarto'
    stand_in.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1.7.32\n[ "$1" = render ] && mkdir -p _docs\nexit 0\n')
    stand_in.chmod(0o755)
    run = subprocess.run(
        [Path(sys.executable).parent / 'nbdev_docs'],
        cwd=copy,
        env=os.environ | dict(PATH=f'{tmp_path}:{os.environ["PATH"]}'),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for f in [*NOTEBOOKS, *(ROOT / 'nbs').glob('*.qmd'), ROOT / 'nbs' / 'styles.css', ROOT / 'nbs' / 'references.bib']:
        assert (copy / '_proc' / f.name).is_file(), f.name
    for link in re.findall(r'!\[[^]]*\]\((?!http)([^)]+)\)', (ROOT / 'README.md').read_text()):
        assert (copy / '_proc' / link).is_file() and (ROOT / link).is_file(), link


@pytest.mark.skipif(not shutil.which('quarto'), reason='Quarto is not on the PATH')
def test_quarto_renders_the_site(copy):
    subprocess.run([Path(sys.executable).parent/'nbdev_docs'], cwd=copy, check=True)
    assert pages() <= {p.stem for p in (copy/'_docs').glob('*.html')}


SOURCES = sorted(p for p in [*(ROOT/'cxrlg').glob('*.py'), *(ROOT/'tests').glob('*.py')] if p.name != '_modidx.py')


@pytest.mark.parametrize('path', SOURCES, ids=lambda p: f'{p.parent.name}/{p.name}')
def test_one_line_holds_one_idea(path):
    "At most 140 characters, no semicolon between statements, no walrus inside a comprehension"
    source = path.read_text()
    long = [line[:40] for line in source.splitlines() if len(line) > 140 and not line.startswith('__all__')]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    semicolons = [t.start[0] for t in tokens if t.type == tokenize.OP and t.string == ';']
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    inside = [n for c in ast.walk(ast.parse(source)) if isinstance(c, comprehensions) for n in ast.walk(c)]
    walruses = [n.lineno for n in inside if isinstance(n, ast.NamedExpr)]
    assert (long, semicolons, walruses) == ([], [], [])


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_an_exported_cell_fits_on_a_screen(path):
    "At most 60 lines, but for a table of fields that has to stand in one class"
    exported = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code' and c.source.startswith('#| export')]
    assert [source.splitlines()[1] for source in exported if len(source.splitlines()) > 60 and 'class TrainConfig' not in source] == []


def exported_pairs(cells):
    "Ids of exported cells that follow another with nothing between them; cells of imports do not count"
    def exports(cell):
        lines = cell.source.splitlines()
        return lines[:1] in (['#| export'], ['#| exporti']) and not all(re.match(r'import |from |[ )]|$', l) for l in lines[1:])
    return [b.id for a, b in zip(cells, cells[1:]) if exports(a) and exports(b)]


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_prose_or_an_example_stands_between_exported_cells(path): assert exported_pairs(nbformat.read(path, 4).cells) == []


def test_two_exported_cells_in_a_row_are_seen():
    written = [('export', 'a = 1'), ('exporti', 'b = 2'), ('export', 'import c')]
    cells = [nbformat.v4.new_code_cell(f'#| {kind}\n{code}') for kind, code in written]
    assert exported_pairs(cells) == [cells[1].id]


def spelled_outside(source):
    "Names of a study's files that stand as texts in a room's code"
    names = {f.name for kind in (FoldFolder, StudyFolder) for f in vars(kind).values() if isinstance(f, FileIn)}
    return {n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and n.value in names - {'lock', 'figures'}}


@pytest.mark.parametrize('room', sorted(set(PAGES) - {'results'}))
def test_the_name_of_a_studys_file_is_written_once(room):
    "In `results`; a model's files are those of `model` too, on a floor below, and of what is exported; the report's template has its name"
    exported = {'model.safetensors', 'config.json'}
    own = dict(model={'model.json', 'model.safetensors'}, ensembles=exported, report={'report.html'})
    assert spelled_outside((ROOT/'cxrlg'/f'{room}.py').read_text()) == own.get(room, set())


def test_a_name_written_twice_is_seen(): assert spelled_outside("path/'done.json'") == {'done.json'}


def test_public_names_are_few():
    "What a reader of the site calls has `#| export`; what only other rooms use has `#| exporti`, and is in no `__all__`"
    assert len(public_names()) <= 120


@pytest.mark.parametrize('room', sorted(PAGES))
def test_every_public_name_says_what_it_does_and_takes(room):
    module = importlib.import_module(f'cxrlg.{room}')
    given = {name: getattr(module, name) for name in module.__all__}
    here = {name: o for name, o in given.items() if callable(o) and o.__module__ == module.__name__}
    assert [name for name, o in here.items() if not (o.__doc__ or '').strip()] == [], 'no docstring'
    assert [(name, row[0]) for name, o in here.items() for row in parameter_rows(o) if not row[3]] == [], 'no docment'


SETTLED = dict(
    asl='AsymmetricLoss', batches='fold_dls', callbacks='EMA', config='TrainConfig', couplings='fit_couplings coupling_path',
    data='read_table register_reader audit PixelCache fold_dls read_film DataError', eval='macro_auc auc_interval delong paired_bootstrap',
    graph='LabelGraph GraphL1 plot_couplings', model='CXRNet save_model load_model', phantom='make_phantom', predict='Predictor',
    splits='MultilabelStratifiedGroupKFold make_folds balance_report assert_disjoint', stability='stable_edges', study='run_study',
    train='train_fold',
)


@pytest.mark.parametrize('room', sorted(SETTLED))
def test_settled_names_come_with_a_star(room):
    "What configurations, the README and programs of others import stays where they look for it"
    given = {}
    exec(f'from cxrlg.{room} import *', given)
    assert set(SETTLED[room].split()) <= set(given)


@pytest.mark.parametrize('room', sorted(PAGES))
def test_a_room_is_read_at_one_sitting(room):
    "At most 450 lines of the module, those of its parameters and the empty ones among them, and 45 cells of its page"
    assert len((ROOT/'cxrlg'/f'{room}.py').read_text().splitlines()) <= 450
    assert len(nbformat.read(ROOT/'nbs'/f'{PAGES[room]}.ipynb', 4).cells) <= 45
