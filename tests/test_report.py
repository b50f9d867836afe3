"""The report: self-contained, safe, the same twice; a figure that fails takes nothing with it; the program does its job only."""
import json
import re
import subprocess
import sys
import warnings
from itertools import combinations

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb, to_rgba_array

import cxrlg.figures as drawing
import cxrlg.report as room
from conftest import ROOT
from cxrlg.config import ARMS
from cxrlg.controls import coupling_controls, plot_changes, plot_label_changes
from cxrlg.core import DataError
from cxrlg.corrections import CORRECTIONS, Outputs
from cxrlg.figures import FIGURES, plot_locked
from cxrlg.report import result_table, write_report
from cxrlg.results import StudyFolder, example_study, read_study
from cxrlg.tables import summarise


@pytest.fixture()
def study(tmp_path): return StudyFolder(example_study(tmp_path/'small', n_patients=150))


@pytest.fixture()
def closed(tmp_path): return StudyFolder(example_study(tmp_path/'closed', 300, seeds=(1, 2), locked=.4))


def rewrite(path, edit): edit(pd.read_parquet(path)).to_parquet(path, index=False)


def strict(path):
    "JSON as the standard has it: no NaN, no Infinity"
    def refuse(constant): raise ValueError(f'{path} holds {constant}')
    return json.loads(path.read_text(), parse_constant=refuse)


def test_report_of_a_study_with_missing_folds_says_so(study):
    study.fold('prox', 42, 1).done.unlink()
    s = read_study(study)
    assert s.notes and all(n in write_report(s, figures={}, n_boot=20).read_text() for n in s.notes)


def test_study_of_one_fold_one_arm_or_without_none(tmp_path):
    one = StudyFolder(example_study(tmp_path/'one', 200, arms=('none',), n_splits=2))
    one.fold('none', 42, 1).done.unlink()
    assert write_report(one, figures={}, n_boot=30).exists() and len(summarise(one, 30)['changes']) == 0
    html = write_report(example_study(tmp_path/'without', 150, arms=('l1',), n_splits=2), figures={}, n_boot=30).read_text()
    assert 'There is no arm none to compare with.' in html


def test_report_is_self_contained_safe_and_the_same_twice(tmp_path):
    evil = example_study(tmp_path/'a<b>&c', 150)
    html = write_report(evil, n_boot=30).read_text()
    assert '<b>&c' not in html and 'a&lt;b&gt;&amp;c' in html
    assert not re.search(r'(src|href)="(?!data:|#)', html) and '<script' not in html and 'viewport' in html and '@media print' in html
    assert html.count('<img') == len(re.findall(r'<img [^>]*alt="[^"]+"', html)) == 8
    assert 'nan' not in re.sub(r'base64,[^"]*', '', html).lower().replace('finan', '')
    first = {f.name: f.read_bytes() for f in evil.rglob('*') if f.is_file()}
    write_report(evil, n_boot=30)
    assert first == {f.name: f.read_bytes() for f in evil.rglob('*') if f.is_file()}
    assert not list(evil.glob('*.tmp-*'))


HOSTILE = {'Edema': '<script>alert(1)</script>', 'Hernia': '=cmd|"/c calc"!A1', 'Cardiomegaly': '{{ 7*7 }}',
           'Pneumonia': 'two\nlines, $x_$ and "quotes"'}


def renamed(t):
    "Predictions whose findings and first film have hostile names"
    parts = [c.partition(':') for c in t]
    columns = [f'{k}:{HOSTILE.get(l, l)}' if l else k for k, _, l in parts]
    return t.set_axis(columns, axis=1).replace({'image': {'film00000.png': '<img src=x onerror=alert(2)>.png'}})


def test_hostile_names_are_shown_as_text(study):
    for fold in study.found().values():
        rewrite(fold.oof, renamed)
        if fold.couplings.exists():
            pd.read_csv(fold.couplings, index_col=0).rename(index=HOSTILE, columns=HOSTILE).to_csv(fold.couplings)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        html = write_report(study, n_boot=20).read_text()
    assert '<script>' not in html and '<img src=x' not in html
    assert '&lt;script&gt;alert(1)&lt;/script&gt;' in html and '{{ 7*7 }}' in html
    assert 'could not be drawn' not in html and html.count('<img') == 8
    labels = [r['label'] for r in strict(study.tables)['labels']]
    assert HOSTILE['Hernia'] in labels and HOSTILE['Pneumonia'] in labels
    assert len(pd.read_csv(study.results)) == 2 and set(strict(study.calibration)['none']) >= set(HOSTILE.values())


def test_phantom_is_said_in_every_heading_and_figure(tmp_path, monkeypatch):
    s, drawn = read_study(example_study(tmp_path/'p', 150, data='phantom')), []
    png = drawing.as_png
    monkeypatch.setattr(drawing, 'as_png', lambda fig, made_up: drawn.append(fig) or png(fig, made_up))
    html = write_report(s, n_boot=30).read_text()
    for tag in (r'<h\d[^>]*>(.*?)</h\d>', r'<figcaption>(.*?)</figcaption>'):
        assert all('(phantom)' in text for text in re.findall(tag, html))
    assert len(drawn) == 8 and all('phantom' in [x.get_text() for x in fig.texts] for fig in drawn)


def test_results_files_say_the_same(study):
    t = summarise(study, 50)
    write_report(study, t, {})
    csv, js = pd.read_csv(study.results), strict(study.tables)
    assert np.allclose(csv['mean'], [r['mean'] for r in js['arms']], atol=1e-6)
    assert {'arm', 'mean', 'low', 'high', 'pooled', 'change', 'verdict', 'adjusted'} <= set(csv)
    assert js['study'] == 'small' and set(t) < set(js)


def test_results_json_holds_every_table_of_the_page(study):
    html, js = write_report(study, n_boot=20, figures={}).read_text(), strict(study.tables)
    assert {'parameters', 'environment', 'headline', 'delong', 'power', 'scale'} <= set(js)
    assert all(line.replace("'", '&#39;') in html for line in js['headline'])
    assert all(p['parameter'] in html for p in js['parameters']) and html.count('<h2') >= 10


def test_locked_section_of_the_report(closed, study):
    s = read_study(closed)
    t = summarise(s, 40)
    html = write_report(s, t, n_boot=40).read_text()
    js, csv = strict(closed.tables), pd.read_csv(closed.results)
    assert 'Locked patients (simulated)</h2>' in html and 'an ensemble, which tends to be better' in html
    assert html.count('<img') == 9 and 'scored once' in html and plot_locked(t['locked']).axes
    assert [r['arm'] for r in js['locked']] == ['none', 'prox'] * 2
    assert np.allclose(csv.locked, [r['locked'] for r in js['locked'][:2]], atol=1e-6)
    assert t['prevalence'].locked.sum() == (s.targets('locked') == 1).sum().sum()
    assert 'locked, scored by the ensembles' in t['flow'].part.tolist()
    assert set(t['locked_calibration'].probabilities) == {'as predicted', 'scaled'} and set(t['locked_labels'].arm) == {'none', 'prox'}
    html = write_report(study, n_boot=20, figures={}).read_text()
    assert 'Locked patients' not in html and strict(study.tables)['locked'] == [] and 'locked' not in pd.read_csv(study.results)


def test_locked_films_that_no_graph_arm_has_scored(closed):
    for f in closed.path.glob('prox/seed*/fold*/locked.parquet'): f.unlink()
    assert write_report(closed, n_boot=20, figures={}).exists()


def test_calibration_file(closed):
    write_report(closed, n_boot=10, figures={})
    js, labels = strict(closed.calibration), read_study(closed).labels
    assert list(js) == ['none', 'prox'] and not list(closed.path.glob('*.tmp-*'))
    for scale in js.values(): assert list(scale) == labels and all(set(x) == {'temperature', 'bias'} for x in scale.values())


def test_flow_and_audit_are_told(study):
    study.flow.write_text(json.dumps(dict(left_out=7)))
    head = 'severity,check,rows,n,what,do\n'
    study.problems.write_text(head + 'warning,near black,"[3, 4]",2,2 films are near black,look at them\n')
    t = summarise(study, 10)
    flow = t['flow'].set_index('part').films
    assert flow['listed'] == flow['all'] + 7 and flow['left out when read: no file'] == 7
    assert t['flow'].part.tolist()[:3] == ['listed', 'left out when read: no file', 'all']
    assert '2 films are near black' in write_report(study, t, {}).read_text()
    study.problems.write_text(head)
    assert 'found nothing to report' in write_report(study, t, {}).read_text()
    study.problems.write_text('')
    with pytest.raises(DataError, match='problems.csv cannot be read'): write_report(study, t, {})


# the first screen

def first_screen(html): return html[html.index('<h1>'):html.index('<nav>')]


def test_verdicts_and_their_figure_come_first_then_couplings_and_the_environment_last(closed):
    html, js = write_report(closed, n_boot=20).read_text(), strict(closed.tables)
    top = first_screen(html)
    assert top.count('<img') == 1 and '<table class="verdicts">' in top and 'What is estimated: the mean change' in top
    assert all(v['clause'] in top and f'{v["verdict"]}<' in top for v in js['verdicts'])
    order = re.findall(r'<h2 id="(\w+)"', html)
    assert order == list(room.SECTIONS) and order[0] == 'couplings' and order[-1] == 'again'
    assert html.index('Parameters') > html.index('id="failures"')
    assert 'compared as arms are' in html and [r['seed'] for r in js['aa']] == [2]


def test_a_verdict_is_bold_only_over_findings_with_enough_positives(study, tmp_path):
    frequent = first_screen(write_report(study, n_boot=20, figures={}).read_text())
    assert '<strong>' in frequent and 'labels with 30 positives or more, the macro AUC over all' in frequent
    rare = first_screen(write_report(example_study(tmp_path/'rare', 12), n_boot=20, figures={}).read_text())
    assert '<strong>' not in rare.split('<table')[1] and 'no verdict is headlined' in rare


def test_one_label_has_no_ceiling_and_says_so(study):
    def keep(t): return t[[c for c in t if ':' not in c or c.endswith(':Edema')]]
    for fold in study.found().values():
        rewrite(fold.oof, keep)
        if fold.couplings.exists(): pd.read_csv(fold.couplings, index_col=0).loc[['Edema'], ['Edema']].to_csv(fold.couplings)
    html = write_report(study, n_boot=20).read_text()
    assert 'couplings could give here is not known: fewer than two findings have an AUC' in first_screen(html)
    assert 'could not be drawn' not in html


def test_columns_have_names_that_can_be_read(closed):
    shown = re.sub(r'base64,[^"]*', '', write_report(closed, n_boot=20, figures={}).read_text())
    for name in ('own_change', 'before_graph', 'p_holm', 'log_loss', 'seed_sd', 'folds_up', '>layer<', '>rare<', '>df<'):
        assert name not in shown, name


# order, and figures that fail

def broken(*_): raise RuntimeError('no <font>\nat all')


@pytest.mark.parametrize('name', list(FIGURES))
def test_a_figure_that_fails_is_named_and_takes_nothing_with_it(closed, monkeypatch, name):
    monkeypatch.setitem(FIGURES, name, (broken, *FIGURES[name][1:]))
    html = write_report(closed, n_boot=5).read_text()
    assert f'The figure {name} could not be drawn (RuntimeError: no &lt;font&gt;)' in html and html.count('<img') == 8
    assert {f.stem for f in closed.figures.iterdir()} == set(FIGURES) - {name}


def test_tables_are_written_before_figures_and_figures_before_the_report(closed, monkeypatch):
    order, write = [], room._write
    monkeypatch.setattr(room, '_write', lambda path, text: order.append(path.name) or write(path, text))
    write_report(closed, n_boot=5)
    assert order[:3] == ['results.csv', 'results.json', 'calibration.json'] and order[-1] == 'report.html'
    assert sorted(order[3:-1]) == sorted(f'{name}.png' for name in FIGURES)


def test_tables_are_there_when_every_figure_fails_and_the_page_cannot_be_made(study, monkeypatch):
    for name in FIGURES: monkeypatch.setitem(FIGURES, name, (broken, *FIGURES[name][1:]))
    monkeypatch.setattr(room, '_page', broken)
    with pytest.raises(RuntimeError): write_report(study, n_boot=5)
    assert study.results.exists() and study.tables.exists() and study.calibration.exists() and not study.report.exists()


def test_a_study_without_any_auc_has_a_report_that_says_why(closed):
    for fold in closed.found().values():
        for f in (fold.oof, fold.locked): rewrite(f, lambda t: t.assign(**{c: np.float32(0) for c in t if c.startswith('y:')}))
    html = write_report(closed, n_boot=5).read_text()
    assert 'Arm none: no macro AUC: No Finding: no positive' in html and 'could not be drawn' not in html and strict(closed.tables)
    assert pd.read_csv(closed.results).note.str.startswith('no macro AUC').all()


# the program

def papermill(out, **parameters):
    "Run the evaluation as a user would; the executed notebook, or None, and what was said"
    pairs = [x for k, v in parameters.items() for x in ('-p', k, str(v))]
    args = [sys.executable, '-m', 'papermill', '06_eval.ipynb', str(out), *pairs, '--no-progress-bar', '-k', 'python3']
    done = subprocess.run(args, cwd=ROOT/'nbs', capture_output=True, text=True)
    return nbformat.read(out, 4) if out.exists() else None, done.returncode, done.stderr


def ran(nb):
    "Positions of the cells that gave an output"
    return [i for i, c in enumerate(nb.cells) if c.cell_type == 'code' and c.outputs]


def test_papermill_does_the_job_and_nothing_else(study, tmp_path):
    nb, status, said = papermill(tmp_path/'out.ipynb', study='small', out_dir=tmp_path, n_boot=20)
    assert status == 0, said[-2000:]
    job = next(i for i, c in enumerate(nb.cells) if 'evaluate_study(' in c.source)
    assert ran(nb) == [job] and study.report.exists()
    shown = ''.join(str(o.get('data', o.get('text', ''))) for o in nb.cells[job].outputs)
    assert all(f'**{name}**' in shown for name in ('arms', 'labels', 'changes', 'power')) and shown.count('image/png') == 8
    assert 'Arm prox: mean fold macro AUC' in shown and 'report.html' in shown


def test_an_unknown_parameter_is_refused_before_anything_else(study, tmp_path):
    nb, status, said = papermill(tmp_path/'out.ipynb', studi='small', out_dir=tmp_path, n_boot=20)
    assert status and "there is no parameter 'studi'; did you mean 'study'" in said
    assert not study.results.exists() and len(ran(nb)) == 1


def test_a_study_that_is_not_there_is_named(study, tmp_path):
    _, status, said = papermill(tmp_path/'out.ipynb', study='smal', out_dir=tmp_path)
    assert status and "did you mean 'small'?" in said


def test_the_page_as_it_stands_shows_its_demonstrations(tmp_path):
    nb, status, said = papermill(tmp_path/'out.ipynb')
    assert status == 0, said[-2000:]
    job = next(i for i, c in enumerate(nb.cells) if 'evaluate_study(' in c.source)
    assert len(ran(nb)) >= 10 and job < min(ran(nb))


def test_a_table_of_a_page_has_its_verdict_first_and_each_interval_beside_its_value():
    t = pd.DataFrame(dict(mean=[.7, .71], low=[.6, np.nan], high=[.8, np.nan], change=[np.nan, -.00001], change_low=[np.nan, -.01],
                          change_high=[np.nan, .01], up=['', '4 of 9'], films=[6367, 12], empty=[np.nan, np.nan],
                          patients=[2312., np.inf], verdict=['', 'equivalent']), index=['none', 'prox'])
    shown = result_table(t, 3)
    assert list(shown) == ['verdict', 'mean', 'change', 'up', 'films', 'patients']
    assert shown.loc['none'].tolist() == ['', '0.700 (0.600\u00a0to\u00a00.800)', '', '', '6,367', '2,312']
    change = '0.000 (-0.010\u00a0to\u00a0+0.010)'
    assert shown.loc['prox'].tolist() == ['equivalent', '0.710', change, '4\u00a0of\u00a09', '12', 'beyond reach']


# one colour a method

def colours_drawn(fig, names):
    "Method -> the colours that it is drawn with: by its entry in a legend, else by the row that bears its name"
    found = {}
    for legend in (*fig.legends, *(ax.get_legend() for ax in fig.axes)):
        for words, handle in zip(legend.get_texts(), legend.legend_handles) if legend else ():
            name = words.get_text().split(' ')[0] # an AUC stands behind the name
            if name in names: found.setdefault(name, set()).add(to_hex(to_rgba_array(handle.get_color())[0]))
    for ax in fig.axes:
        rows = {round(at, 6): words.get_text().split(' ')[0] for at, words in zip(ax.get_yticks(), ax.get_yticklabels())}
        for line in ax.lines:
            at = np.unique(np.round(np.asarray(line.get_ydata(), float), 6))
            name = rows.get(at[0]) if len(at) == 1 and line.get_marker() == 'o' else None
            if name in names: found.setdefault(name, set()).add(to_hex(line.get_color()))
    return found


def test_a_method_has_one_colour_in_all_drawings(tmp_path):
    arms = ('none', 'l1', 'prox', 'free', 'tied', 'mine')
    study = read_study(example_study(tmp_path/'arms', 250, arms=arms, locked=.3))
    tables = summarise(study, n_boot=20)
    figures = {name: FIGURES[name][0](study, tables, '') for name in ('arms', 'auc', 'roc', 'training', 'changes')}
    seen = {name: colours_drawn(fig, arms) for name, fig in figures.items()}
    assert all(set(found) >= set(arms) - {'none'} for found in seen.values())
    expected = {name: {colour} for name, colour in drawing.method_colours(arms).items()}
    for name, found in seen.items(): assert found == {arm: expected[arm] for arm in found}, name


def test_corrections_have_the_colours_of_their_method(four_findings):
    out = four_findings
    trained = Outputs(out.targets, out.logits, out.patients, out.folds, out.labels, dict(prox=out.logits))
    names = ('scale', 'couplings', 'stacking', 'ridge')
    found = coupling_controls(trained, arms=names, n_boot=20, bar=False)
    for ax in (plot_changes(found), plot_label_changes(found, ('prox', *names[1:]))):
        drawn = colours_drawn(ax.figure, ('prox', *names))
        assert len(drawn) >= 4 and drawn == {name: {drawing.METHOD_COLOURS[name]} for name in drawn}
        plt.close(ax.figure)


def test_every_method_has_a_colour():
    assert set(drawing.METHOD_COLOURS) == {*ARMS, 'posthoc', *CORRECTIONS}
    assert drawing.METHOD_COLOURS['posthoc'] == drawing.METHOD_COLOURS['couplings']


RED_BLIND = ((.152286, 1.052583, -.204868), (.114503, .786281, .099216), (-.003882, -.048116, 1.051998)) # Machado et al., 2009
GREEN_BLIND = ((.367322, .860646, -.227968), (.280085, .672501, .047413), (-.01182, .04294, .968881))


def linear(colour):
    v = np.array(to_rgb(colour))
    return np.where(v <= .04045, v/12.92, ((v + .055)/1.055)**2.4)


def lab(rgb):
    "CIE L*a*b* of linear sRGB"
    to_xyz = np.array([[.4124, .3576, .1805], [.2126, .7152, .0722], [.0193, .1192, .9505]])
    x, y, z = np.cbrt(to_xyz @ np.clip(rgb, 1e-3, 1)/[.9505, 1, 1.089])
    return np.array([116*y - 16, 500*(x - y), 200*(y - z)])


TOGETHER = (('none', 'l1', 'prox', 'free', 'tied', 'posthoc'), ('l1', 'prox', 'couplings_min', 'stacking'),
            ('couplings', 'couplings_min', 'ridge'))


@pytest.mark.parametrize('seen', [np.eye(3), RED_BLIND, GREEN_BLIND], ids=['all colours', 'no red', 'no green'])
def test_methods_that_stand_in_one_figure_can_be_told_apart(seen):
    for names in TOGETHER:
        for a, b in combinations(names, 2):
            ends = [lab(np.array(seen) @ linear(drawing.METHOD_COLOURS[name])) for name in (a, b)]
            assert np.linalg.norm(ends[0] - ends[1]) > 12, f'{a} and {b}'


@pytest.mark.parametrize('name', list(drawing.METHOD_COLOURS))
def test_a_colour_stands_out_from_white(name):
    assert 1.05/(np.dot((.2126, .7152, .0722), linear(drawing.METHOD_COLOURS[name])) + .05) >= 3
