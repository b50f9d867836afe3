"The repository's face: workflows, forms and texts for those who join, and the site's pages as far as their sources show it."
import ast
import configparser
import functools
import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import yaml
from fastcore.basics import AttrDict
from nbconvert.filters import markdown2html

import site_pages
from conftest import ROOT
from cxrlg._pages import ParameterTable, parameter_rows, unlink_private
from cxrlg.core import DataError

GITHUB = ROOT/'.github'
WORKFLOWS = sorted((GITHUB/'workflows').glob('*.yml'))
FORMS = sorted(p for p in (GITHUB/'ISSUE_TEMPLATE').glob('*.yml') if p.name != 'config.yml')
MODULES = sorted(p for p in (ROOT/'cxrlg').glob('*.py') if not p.name.startswith('_'))


class OnceLoader(yaml.SafeLoader):
    "YAML whose mappings name each key once, and whose `on` is a text"
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(':bool')]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        assert len(set(keys)) == len(keys), f'a key twice in line {node.start_mark.line + 1}'
        return super().construct_mapping(node, deep)


def read_yaml(path): return yaml.load(path.read_text(), OnceLoader)


def settings():
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    return cfg['DEFAULT']


# ---- workflows and forms

@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_has_the_form_that_github_asks_for(path):
    flow = read_yaml(path)
    assert set(flow) <= {'name', 'on', 'permissions', 'concurrency', 'env', 'defaults', 'jobs'}
    assert set(flow['on']) <= {'push', 'pull_request', 'schedule', 'workflow_dispatch', 'release'}
    assert flow['permissions'] == {'contents': 'read'}, 'a job asks for more by itself'
    for name, job in flow['jobs'].items():
        assert set(job) <= {'name', 'if', 'needs', 'runs-on', 'timeout-minutes', 'permissions', 'environment', 'strategy', 'steps'}
        assert job['runs-on'] and job['timeout-minutes'] and job.get('needs', name) in flow['jobs']
        for step in job['steps']:
            assert set(step) <= {'name', 'id', 'if', 'uses', 'with', 'run', 'env'}
            assert ('uses' in step) != ('run' in step)


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_names_what_there_is(path):
    flow, text = read_yaml(path), path.read_text()
    targets = set(re.findall(r'^([\w-]+):', (ROOT/'Makefile').read_text(), flags=re.M))
    steps = [s for job in flow['jobs'].values() for s in job['steps']]
    assert {m for s in steps for m in re.findall(r'\bmake ([\w-]+)', s.get('run', ''))} <= targets
    assert all((ROOT/f).is_file() for s in steps for f in re.findall(r'tests/[\w.]+', s.get('run', '')))
    assert all(re.fullmatch(r'[\w.-]+(/[\w.-]+)+@v\d+', s['uses']) for s in steps if 'uses' in s)
    known = {'github', 'matrix', 'steps'}
    assert {m for m in re.findall(r'\$\{\{ *(\w+)\.', text)} <= known and text.count('${{') == len(re.findall(r'\$\{\{[^{}]+\}\}', text))


def test_the_tests_run_where_the_lock_holds():
    matrix = read_yaml(GITHUB/'workflows'/'tests.yml')['jobs']['locked']['strategy']['matrix']
    head = (ROOT/'requirements.lock').read_text().splitlines()[0]
    assert matrix['python'] == re.findall(r'3\.\d+', head) and {o.partition('-')[0] for o in matrix['os']} == {'ubuntu', 'macos'}
    assert 'Linux' in head and 'macOS' in head
    classifiers = re.findall(r'Python :: (3\.\d+)', (ROOT/'setup.py').read_text())
    assert classifiers == matrix['python'] and settings()['min_python'] == classifiers[0]


def test_the_site_is_rendered_by_the_version_that_make_asks_for():
    steps = read_yaml(GITHUB/'workflows'/'docs.yml')['jobs']['render']['steps']
    version = next(s['with']['version'] for s in steps if 'quarto' in s.get('uses', ''))
    least = re.search(r'Quarto (\d+\.\d+) or later', (ROOT/'Makefile').read_text())[1]
    assert least == '1.8' and version.startswith(least)


@pytest.mark.parametrize('path', FORMS, ids=lambda p: p.stem)
def test_form_has_the_parts_that_github_asks_for(path):
    form = read_yaml(path)
    assert {'name', 'description', 'body'} <= set(form) <= {'name', 'description', 'body', 'title', 'labels', 'assignees'}
    ids = [part['id'] for part in form['body'] if part['type'] != 'markdown']
    assert len(set(ids)) == len(ids) > 0
    for part in form['body']:
        assert part['type'] in {'markdown', 'textarea', 'input', 'dropdown', 'checkboxes'}
        assert set(part) <= {'type', 'id', 'attributes', 'validations'}
        assert part['attributes'].get('value' if part['type'] == 'markdown' else 'label')


def test_forms_link_what_there_is():
    contact = read_yaml(GITHUB/'ISSUE_TEMPLATE'/'config.yml')
    assert set(contact) == {'blank_issues_enabled', 'contact_links'}
    assert all(set(c) == {'name', 'url', 'about'} for c in contact['contact_links'])


# ---- tools

def test_hooks_are_local_and_fetch_nothing():
    hooks = read_yaml(ROOT/'.pre-commit-config.yaml')['repos']
    assert [repo['repo'] for repo in hooks] == ['local']
    for hook in hooks[0]['hooks']:
        assert hook['language'] == 'system' and hook['entry'].startswith('.venv/bin/')
        tool = hook['entry'].split()[0].removeprefix('.venv/bin/').partition('_')[0]
        assert re.search(rf'^{tool}==', (ROOT/'requirements.lock').read_text(), flags=re.M)


def test_pyproject_is_for_tools_only():
    import tomllib
    tools = tomllib.loads((ROOT/'pyproject.toml').read_text())
    assert set(tools) == {'build-system', 'tool'} and tools['tool']['ruff']['line-length'] == 140
    assert not (ROOT/'ruff.toml').exists() and not (ROOT/'setup.cfg').exists()


def test_the_package_says_that_it_is_typed():
    assert (ROOT/'cxrlg'/'py.typed').is_file()
    setup = (ROOT/'setup.py').read_text()
    assert "'py.typed'" in setup and "'Typing :: Typed'" in setup
    assert f"'{settings()['status']}': " in setup, 'settings.ini and the classifier are one status'


# ---- SECURITY.md

PICKLES = r'(pickle|marshal|shelve|dill|cloudpickle)\.loads?'
UNSAFE = re.compile(rf'\b(allow_pickle=True|{PICKLES}|joblib\.load|yaml\.(unsafe_|full_)load|read_pickle)\b')


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_nothing_loads_pickled_code(path):
    text = path.read_text()
    assert not UNSAFE.search(text)
    for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) == 'yaml.load': assert f'class {ast.unparse(call.args[1])}(yaml.SafeLoader)' in text, path.name
        if ast.unparse(call.func) == 'torch.load': assert 'weights_only=True' in ast.unparse(call), f'{path.name}, line {call.lineno}'


def test_pickled_weights_run_no_code(tmp_path):
    from cxrlg.model import CXRNet

    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'executed'),)
    (tmp_path/'w.pth').write_bytes(pickle.dumps(Evil(), 2))
    with pytest.raises(DataError, match='cannot be read as weights'): CXRNet('test_resnet', ['a', 'b'], weights=str(tmp_path/'w.pth'))
    assert not (tmp_path/'executed').exists()


def test_what_security_names_is_tested():
    named = re.findall(r'`(test_\w+\.py)`: ((?:`test_\w+`(?:, )?)+)', (ROOT/'SECURITY.md').read_text())
    tests = [(file, test) for file, some in named for test in re.findall(r'`(\w+)`', some)]
    assert len(tests) >= 10
    for file, test in tests: assert f'def {test}(' in (ROOT/'tests'/file).read_text(), f'{file} has no {test}'


# ---- CHANGELOG.md

def test_changelog_is_kept_as_keepachangelog_says():
    text = (ROOT/'CHANGELOG.md').read_text()
    versions = re.findall(r'^## (.*)$', text, flags=re.M)
    assert versions[0] == '[Unreleased]'
    assert all(re.fullmatch(r'\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d', v) for v in versions[1:])
    assert versions[1].startswith(f'[{settings()["version"]}]')
    kinds = {'Added', 'Changed', 'Deprecated', 'Removed', 'Fixed', 'Security'}
    assert set(re.findall(r'^### (.*)$', text, flags=re.M)) <= kinds
    for v in versions: assert re.search(rf'^\[{re.escape(v.split("]")[0][1:])}\]: https://', text, flags=re.M), v


def test_citation_and_changelog_agree():
    cff = yaml.safe_load((ROOT/'CITATION.cff').read_text())
    assert f'## [{cff["version"]}] - {cff["date-released"]}' in (ROOT/'CHANGELOG.md').read_text()
    assert cff['version'] == settings()['version']


# ---- pages, as far as their sources show them

NBS = ROOT/'nbs'
NOTEBOOKS = sorted(NBS.glob('*.ipynb'))
PAGES = [*NOTEBOOKS, *sorted(NBS.glob('*.qmd'))]
LINK = re.compile(r'(?<!\!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)')
CODE = re.compile(r'^(`{3,}|~{3,}).*?^\1|`[^`\n]+`', flags=re.M | re.S)


def cells(path, kind='markdown'): return [c for c in nbformat.read(path, 4).cells if c.cell_type == kind]


@functools.cache
def prose(path):
    "Markdown of a page without its front matter"
    if path.suffix == '.ipynb': return '\n\n'.join(c.source for c in cells(path))
    return re.sub(r'\A---\n.*?\n---\n', '', path.read_text(), flags=re.S)


@functools.cache
def front(path):
    "Title and description of a page"
    if path.suffix == '.ipynb': return dict(zip(('title', 'description'), re.match(r'# (.+)\n\n> (.+)', cells(path)[0].source).groups()))
    return yaml.safe_load(re.match(r'---\n(.*?)\n---\n', path.read_text(), flags=re.S)[1])


def headings(text): return re.findall(r'^#{1,6} +(.+?)\s*$', CODE.sub(lambda m: '' if m[1] else m[0], text), flags=re.M)


def slug(heading):
    "The anchor that Pandoc gives a heading"
    explicit = re.search(r'\{#([\w-]+)[^}]*\}$', heading)
    if explicit: return explicit[1]
    plain = re.sub(r'[^\w\s.-]', '', LINK.sub(r'\1', heading)).lower()
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', plain.strip()))


def documented(path):
    "The names that nbdev documents on a page, as anchors: those of its exported cells, and methods that are patched in"
    found = set()
    for c in cells(path, 'code') if path.suffix == '.ipynb' else []:
        found |= {o.lower() for o in re.findall(r'^show_doc\(([\w.]+)', c.source, flags=re.M)}
        if not re.match(r'#\| *exports?\b', c.source): continue
        for node in ast.parse(c.source).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
            patched = any('patch' in ast.unparse(d) for d in node.decorator_list)
            owner = f'{ast.unparse(node.args.args[0].annotation)}.' if patched and node.args.args[0].annotation else ''
            found.add((owner + node.name).lower())
    return found


@functools.cache
def anchors(path):
    text = prose(path)
    code = cells(path, 'code') if path.suffix == '.ipynb' else []
    labels = [o for c in code for o in re.findall(r'^#\| label: (\S+)', c.source, flags=re.M)]
    return {slug(h) for h in headings(text)} | set(re.findall(r'\{#([\w-]+)', text)) | set(labels) | documented(path)


def links(path): return [(words, target) for words, target in LINK.findall(CODE.sub('', prose(path)))]


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_page_says_what_it_is(path):
    said = front(path)
    description = said.get('description') or said.get('description-meta')
    assert said.get('title') or said.get('pagetitle')
    assert description and len(description) > 40


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_title_and_its_claim_stand_alone_in_their_cell(path):
    "nbdev makes the head of the page of this cell, and takes it out: other text in it would not be on the site"
    assert re.fullmatch(r'# .+\n\n> .+', cells(path)[0].source.strip())


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_links_lead_to_a_page_and_to_a_place_on_it(path):
    for words, target in links(path):
        page, _, anchor = target.partition('#')
        if re.match(r'https?://(?!cxrlg\.github\.io/cxrlg/)|mailto:', page): continue
        page = re.sub(r'https://cxrlg\.github\.io/cxrlg/(.*)\.html$', lambda m: source_of(m[1]).name, page)
        other = NBS/page if page else path
        assert other.exists() or page.startswith('https://'), f'[{words}]({target}): no such page'
        assert not anchor or anchor in anchors(other), f'[{words}]({target}): no such place; there are {sorted(anchors(other))}'


def source_of(name):
    "The notebook or text of a page of the site: nbdev drops the number in front of a notebook's name"
    return next(p for p in PAGES if re.sub(r'^\d+[a-zA-Z0-9]*_', '', p.stem.lower()) == name)


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_pages_are_linked_beside_each_other_and_by_what_they_are_called(path):
    for words, target in links(path):
        assert 'cxrlg.github.io' not in target, f'[{words}]({target}): a page of this site is linked by its file'
        assert not re.fullmatch(r'`?\d\d\w*(\.ipynb|\.qmd)?`?', words), f'[{words}]({target}): link by the title, not by the file'


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_headings_end_without_a_dash(path):
    kept = [c.source for c in cells(path)] if path.suffix == '.ipynb' else [prose(path)]
    for text in kept:
        if re.fullmatch(r'#+ .* -', text.strip()): continue # nbdev takes this cell out: the name's own documentation has the heading
        assert not [h for h in headings(text) if h.endswith(' -')]


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_every_picture_in_the_text_has_words_for_those_who_do_not_see_it(path):
    for words, file in re.findall(r'!\[([^\]]*)\]\(([^)\s]+)', CODE.sub('', prose(path))):
        assert len(words.split()) >= 5, f'{file}: no alternative text'
        assert file.startswith('https://') or (NBS/file).is_file(), file
    assert not re.search(r'<img(?![^>]*\balt=)', CODE.sub('', prose(path)))


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_no_markdown_link_stands_in_code(path):
    assert [m[0] for m in CODE.finditer(prose(path)) if '](http' in m[0]] == []


def test_the_navigation_shows_where_one_is():
    site, html = (yaml.safe_load((ROOT/'_quarto.yml').read_text())[k] for k in ('website', 'format'))
    assert site['bread-crumbs'] and site['page-navigation'] and html['html']['toc-depth'] == 4
    assert (NBS/site['favicon']).is_file() and (NBS/html['html']['css']).is_file()
    assert all((NBS/f).is_file() for f in html['html']['filters'])
    assert settings()['git_url'] in [tool['href'] for tool in site['navbar']['tools']]


# ---- tables

def tables_without_caption(path):
    "The first words of each printed table and each table in the text of a page that has no caption"
    bare = []
    for c in nbformat.read(path, 4).cells:
        if c.cell_type == 'code':
            printed = sum('<table' in o.get('data', {}).get('text/html', '') for o in c.outputs)
            if printed > len(re.findall(r'^#\| tbl-cap: ".+"$', c.source, flags=re.M)): bare.append(c.source[:80])
        else: bare += [table[:80] for table, after in re.findall(r'^((?:\|.*\n?)+)(\n: \S)?', c.source, flags=re.M) if not after]
    return bare


@pytest.mark.parametrize('path', sorted(NBS.glob('20_*.ipynb')), ids=lambda p: p.stem)
def test_every_table_of_a_result_page_has_a_caption_that_stands_alone(path):
    assert tables_without_caption(path) == []
    codes = [c.source for c in cells(path, 'code')]
    captions = [m for s in codes for m in re.findall(r'^#\| (?:tbl|fig)-cap: "(.+)"$', s, flags=re.M)]
    assert captions and all(len(m.split()) >= 6 and not re.match(r'the same\b', m, flags=re.I) for m in captions)


def test_a_table_without_caption_is_seen(tmp_path):
    bare, with_caption = '| a | b |\n|---|---|\n| 1 | 2 |\n', '| a | b |\n|---|---|\n| 1 | 2 |\n\n: What it is.\n'
    table = nbformat.v4.new_output('display_data', {'text/html': '<table></table>'})
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(s) for s in (bare, with_caption)])
    nb.cells += [nbformat.v4.new_code_cell(s, outputs=[table]) for s in ('1', '#| tbl-cap: "What it is."\n1')]
    nbformat.write(nb, tmp_path/'page.ipynb')
    assert tables_without_caption(tmp_path/'page.ipynb') == [bare, '1']


# ---- the front page

def first_table(text): return re.search(r'(?:^\|.*\n)+', text, flags=re.M)[0]


def test_the_front_page_has_the_table_of_the_readme():
    assert first_table((NBS/'index.qmd').read_text()) == first_table((ROOT/'README.md').read_text())


def test_the_front_page_answers_on_its_first_screen():
    "Two short paragraphs, three buttons and the figure, then the table"
    first = prose(NBS/'index.qmd').partition('\n|')[0]
    before, figure, _ = first.partition('![')
    buttons = re.findall(r'\[([^\]]+)\]\((\S+)\)\{\.btn', before)
    assert buttons == [('Run on your films', 'run.qmd'), ('See the evidence', 'findings.qmd'), ('API', 'names.qmd')]
    assert figure and len(before.split()) <= 100


def test_nbdev_leaves_the_readme_alone():
    "It makes README.md from `index.ipynb`, which is not there"
    assert not (NBS/'index.ipynb').exists() and 'readme_nb' not in settings()


# ---- the style sheet

CSS = (NBS/'styles.css').read_text()


def declarations(selector):
    "What the style sheet says of exactly this selector, outside of media queries"
    plain = re.sub(r'/\*.*?\*/', '', CSS, flags=re.S)
    bodies = [body for head, body in re.findall(r'([^{}]+)\{([^{}]*)\}', plain) if selector in [s.strip() for s in head.split(',')]]
    return dict(pair.strip().split(':', 1) for body in bodies for pair in body.split(';') if ':' in pair)


def luminance(colour):
    channels = [int(colour[i:i + 2], 16)/255 for i in (1, 3, 5)]
    r, g, b = [c/12.92 if c <= .04045 else ((c + .055)/1.055)**2.4 for c in channels]
    return .2126*r + .7152*g + .0722*b


def contrast(a, b):
    low, high = sorted([luminance(a), luminance(b)])
    return (high + .05)/(low + .05)


def test_contrast_is_that_of_the_standard():
    assert abs(contrast('#000000', '#ffffff') - 21) < 1e-9 and abs(contrast('#777777', '#ffffff') - 4.48) < .01


@pytest.mark.parametrize('mode', ['', '.quarto-dark '], ids=['light', 'dark'])
def test_code_in_a_sentence_can_be_read(mode):
    said = {k: v.strip() for k, v in declarations(f'{mode}:not(pre) > code:not(.sourceCode)').items()}
    assert contrast(said['color'], said['background-color']) >= 4.5
    comment = declarations(f'{mode}code span.co')['color'].strip()
    assert contrast(comment, '#222222' if mode else '#f4f4f4') >= 4.5, 'darkly is #222, and blocks of code in cosmo are about #f4f4f4'


def test_both_themes_have_one_font():
    assert 'system-ui' in declarations('body')['font-family'] and declarations('body') == declarations('h1') == declarations('.sidebar')
    assert 'font-family' not in ''.join(k for s in ('.quarto-dark', 'body.quarto-dark') for k in declarations(s))


WIDE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<style>body {{ margin: 0; }}</style><style>{css}</style><main style="padding: 12px">
<p>A sentence with <code>a_name_that_is_longer_than_any_line_of_a_telephone_could_hold_and_has_no_place_to_break</code> in it.</p>
<span class="math display"><mjx-container display="true">
<span style="display: inline-block; width: 900px">long</span></mjx-container></span>
<p>Text with <span class="math inline"><mjx-container><span style="display: inline-block; width: 500px">x</span></mjx-container></span></p>
<table><thead><tr>{head}</tr></thead><tbody><tr>{row}</tr></tbody></table>
<pre><code>{line}</code></pre>
<div class="cell-output-display"><table><tbody><tr>{row}</tr></tbody></table><img width="1200" height="9" alt=""></div></main>
"""
MEASURE = """<iframe src="page.html" style="width: 390px; height: 800px; border: 0"></iframe><script>
onload = () => {
  const page = document.querySelector('iframe').contentDocument, table = page.querySelector('table'), first = table.querySelector('td');
  const left = first.getBoundingClientRect().left;
  table.scrollLeft = 200;
  document.body.dataset.found = [page.documentElement.scrollWidth, table.scrollLeft, first.getBoundingClientRect().left - left].join(' ');
};</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('chromium'), reason='Chromium is not on the PATH')
def test_nothing_scrolls_the_page_sideways_on_a_phone(tmp_path):
    cells_of = lambda tag: ''.join(f'<{tag}>column_{i}_of_many</{tag}>' for i in range(12))
    page = WIDE.format(css=CSS, head=cells_of('th'), row=cells_of('td'), line='a line of code '*20)
    (tmp_path/'page.html').write_text(page)
    (tmp_path/'measure.html').write_text(MEASURE)
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--allow-file-access-from-files', f'--user-data-dir={tmp_path}/profile']
    command = ['chromium', *flags, '--dump-dom', (tmp_path/'measure.html').as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    width, scrolled, moved = (float(o) for o in re.search(r'data-found="([^"]+)"', run.stdout)[1].split())
    assert width <= 390 and scrolled == 200 and abs(moved) < 3, 'the table scrolls in its box, and its first column stays'


def as_html(path):
    "A page with its tables and outputs as the site lays them out, without pictures"
    def shown(out):
        html = out.get('data', {}).get('text/html')
        return f'<div class="cell-output-display">{html}</div>' if html else f'<pre>{escape(out.get("text", ""))}</pre>'
    cells_of = nbformat.read(path, 4).cells if path.suffix == '.ipynb' else [AttrDict(cell_type='markdown', source=prose(path))]
    parts = []
    for c in cells_of:
        if c.cell_type == 'markdown': parts.append(markdown2html(re.sub(r'!\[.*?\]\(.*?\)(\{.*?\})?', '', c.source, flags=re.S)))
        parts += [shown(o) for o in c.get('outputs', []) if o.output_type != 'error']
    head = '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>body { margin: 0; }</style>'
    return f'{head}<style>{CSS}</style><main style="max-width: 790px; padding: 12px; box-sizing: border-box">{"".join(parts)}</main>'


MEASURE_ALL = """<script>
onload = () => {
  const found = {};
  for (const frame of document.querySelectorAll('iframe')) {
    const page = frame.contentDocument, cut = [];
    for (const table of page.querySelectorAll('.cell-output-display table')) {
      const box = table.getBoundingClientRect(), heads = [...table.querySelectorAll('thead th')];
      const verdict = heads.find(o => o.textContent.trim() == 'verdict');
      if (verdict && verdict.getBoundingClientRect().right > box.right + 1) cut.push(heads.map(o => o.textContent.trim()).join(' '));
    }
    found[frame.name] = [page.documentElement.scrollWidth, cut];
  }
  document.body.dataset.found = JSON.stringify(found);
};</script>"""
RESULTS = [*sorted(NBS.glob('20_*.ipynb')), *(NBS/f'{name}.qmd' for name in ('index', 'findings', 'paper', 'others', 'run'))]


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    "Width of each page and its tables whose verdict is cut off, at the width of a phone and of a laptop"
    here = tmp_path_factory.mktemp('pages')
    for path in PAGES: (here/f'{path.stem}.html').write_text(as_html(path))
    def frame(name, width): return f'<iframe name="{width} {name}" src="{name}.html" style="width: {width}px"></iframe>'
    frames = [frame(path.stem, width) for path in PAGES for width in (390, 1400)]
    (here/'all.html').write_text(''.join(frames) + MEASURE_ALL)
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--allow-file-access-from-files', f'--user-data-dir={here}/profile']
    run = subprocess.run(['chromium', *flags, '--dump-dom', (here/'all.html').as_uri()], capture_output=True, text=True, timeout=240)
    return json.loads(unescape(re.search(r'data-found="([^"]+)"', run.stdout)[1]))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('chromium'), reason='Chromium is not on the PATH')
@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_pages_fit_a_phone(path, measured): assert measured[f'390 {path.stem}'][0] <= 390


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('chromium'), reason='Chromium is not on the PATH')
@pytest.mark.parametrize('path', RESULTS, ids=lambda p: p.stem)
def test_result_pages_show_their_verdicts(path, measured): assert measured[f'1400 {path.stem}'][1] == [], 'a verdict is cut off at 1,400 px'


# ---- the tutorial

def fences(path): return re.findall(r'^```(?:\{?\.?(\w+)(?: filename="([^"]+)")?\}?)?\n(.*?)\n?^```$', path.read_text(), flags=re.M | re.S)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A fresh folder with the files that the tutorial says to save"
    here = tmp_path_factory.mktemp('tutorial')
    for _, name, text in fences(NBS/'tutorial.qmd'):
        if name: (here/name).write_text(text + '\n')
    return here


def typed(command, folder):
    "What a command of the tutorial prints"
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    env = os.environ | dict(PYTHONPATH=str(ROOT), PATH=path, CUDA_VISIBLE_DEVICES='')
    run = subprocess.run(['sh', '-ec', command], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@pytest.mark.slow
def test_the_commands_of_the_tutorial_answer_as_it_says(folder):
    "All but the two long ones, in their order: what is printed below a command is what it prints"
    steps = [(language, text) for language, name, text in fences(NBS/'tutorial.qmd') if not name]
    quick = 0
    for (language, command), (after, said) in zip(steps, steps[1:]):
        long = 'cxrlg_' in command or 'predictions.csv' in command
        if language != 'sh' or long or command.startswith('mkdir'): continue
        printed = typed(command, folder)
        if not after: assert [o.rstrip() for o in printed.splitlines()] == [o.rstrip() for o in said.splitlines()], command
        quick += 1
    assert quick >= 5 and len(list((folder/'films').glob('*.png'))) == 422


def test_the_configuration_of_the_tutorial_is_six_folds(folder):
    from cxrlg.study import expand, read_config
    jobs = expand(read_config(folder/'mine.yaml', dict(data_dir=str(folder/'films'))))
    assert len(jobs) == 6 and {job.arm for job in jobs} == {'none', 'prox'}


def test_every_word_of_the_glossary_has_a_place_and_a_sentence():
    words = re.findall(r'^\[([^\]]+)\]\{#([\w-]+)\}\n:   (.+)$', prose(NBS/'glossary.qmd'), flags=re.M)
    assert len(words) >= 40 and len({anchor for _, anchor, _ in words}) == len(words)
    for word, anchor, said in words: assert slug(word) == anchor and said.endswith('.')


# ---- what is made from the code

@pytest.mark.parametrize('file', ['names.qmd', 'parameters.qmd', 'command_line.qmd'])
def test_made_pages_are_those_of_the_code(file):
    "`python tests/site_pages.py` writes them again"
    made = dict(names=site_pages.names_page, parameters=site_pages.parameters_page, command_line=site_pages.commands_page)
    assert (NBS/file).read_text() == made[file.removesuffix('.qmd')](), 'the code has changed: python tests/site_pages.py'


def example(
    x:int, # a number, or `None`
    way:str|None='a|b', # one | other
    *rest, # more of them
) -> list: # what is found
    "Find something\n\nAnd much more."


def test_parameters_are_a_table():
    text = ParameterTable(example)._repr_markdown_()
    assert '\nexample(x, way=\'a|b\', *rest)\n' in text and '*Find something*' in text and 'And much more' not in text
    assert '| `x` | `int` |  | a number, or `None` |\n| `way` | `str or None` |' in text
    assert " | `'a\\|b'` | one \\| other |\n| `*rest` |  |  | more of them |" in text
    assert '| **returns** | `list` |  | what is found |' in text


def test_parameters_of_a_class_and_of_a_configuration():
    from cxrlg.predict import Predictor
    from cxrlg.train import TrainConfig
    rows = {name: rest for name, *rest in parameter_rows(Predictor)}
    assert rows['raw'][:2] == ['bool', 'False'] and 'self' not in rows
    text = ParameterTable(TrainConfig)._repr_markdown_()
    assert '__main__' not in text and 'TrainConfig(...)' in text and "| `group` | `str` | `'patient'` |" in text
    assert len(parameter_rows(TrainConfig)) == len(TrainConfig.table())


def test_the_site_shows_names_so():
    cfg = settings()
    assert cfg['renderer'] == 'cxrlg._pages.ParameterTable' and cfg['procs'] == 'cxrlg._pages:unlink_private'


def test_only_documented_names_are_links():
    site = 'https://cxrlg.github.io/cxrlg/eval.html'
    known, private = f'[`macro_auc`]({site}#macro_auc)', f'[`simulate`]({site}#simulate){{.x}}'
    cell = AttrDict(cell_type='markdown', source=f'{known} and {private} and [`other`](run.qmd)')
    unlink_private(cell)
    assert cell.source == f'{known} and `simulate` and [`other`](run.qmd)'


# ---- texts

TEXTS = sorted(NBS.glob('*.qmd'))
MADE = {'names.qmd', 'parameters.qmd', 'command_line.qmd'}


def sentences(text):
    "The sentences outside of tables and code, links as their words"
    plain = LINK.sub(r'\1', re.sub(r'^(`{3,}).*?^\1', '', text, flags=re.M | re.S))
    for part in re.split(r'\n\s*\n|\n(?=[-*:>#] |\d+\. )|^\|.*$', plain, flags=re.M):
        yield from re.split(r'(?<=[.!?:])(?:\*\*)?\s+', ' '.join(part.split()))


READ = [*(p for p in TEXTS if p.name not in MADE), ROOT/'README.md', ROOT/'CONTRIBUTING.md']

@pytest.mark.parametrize('path', READ, ids=lambda p: p.stem)
def test_no_sentence_of_a_text_is_longer_than_27_words(path):
    assert [s for s in sentences(prose(path) if path in TEXTS else path.read_text()) if len(s.split()) > 27] == []


@pytest.mark.parametrize('path', TEXTS, ids=lambda p: p.stem)
def test_what_a_text_imports_is_there(path):
    for module, names in re.findall(r'^from (cxrlg[\w.]*) import ([\w, ]+)$', path.read_text(), flags=re.M):
        room = importlib.import_module(module)
        assert all(hasattr(room, name) for name in names.split(', ')), f'{module}: {names}'
        shown = getattr(room, '__all__', names.split(', '))
        assert set(names.split(', ')) <= set(shown), f'{module} does not give away {names}'


def test_every_question_has_an_anchor_and_a_cure_below_its_message():
    entries = re.split(r'^### ', prose(NBS/'faq.qmd'), flags=re.M)[1:]
    assert len(entries) >= 26
    for entry in entries:
        head, _, rest = entry.partition('\n')
        assert re.search(r'\{#[\w-]+\}$', head), head
        parts = [p for p in rest.split('\n\n') if p.strip() and not p.startswith('## ')]
        assert len(parts) >= 1 + parts[0].lstrip().startswith('>') and not parts[-1].lstrip().startswith('>'), f'{head}: no cure'


# ---- rendered pages, where `make docs` has made them

DOCS = ROOT/'_docs'


class Faults(HTMLParser):
    "What is wrong with one rendered page; its anchors and links are kept for the others"
    def __init__(self, html):
        super().__init__()
        self.found, self.anchors, self.links, self.inside = [], set(), [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        said = dict(attrs)
        if said.get('id'): self.anchors.add(said['id'])
        if tag == 'a' and said.get('href'): self.links.append(said['href'])
        if tag == 'img' and not said.get('alt') and 'aria-hidden' not in said:
            self.found.append(f'no alternative text: {said.get("src", "")[:60]}')
        if tag in {'code', 'h1', 'h2', 'h3', 'h4'}: self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag: self.inside.pop()

    def handle_data(self, text):
        if 'code' in self.inside and '](http' in text: self.found.append(f'a raw link in code: {text[:60]}')
        if self.inside and self.inside[-1] != 'code' and text.rstrip().endswith(' -'):
            self.found.append(f'a heading with a dash: {text[:60]}')


def faults(folder):
    "Page -> what is wrong with it, links to places that are not there among it"
    read = {p.name: Faults(p.read_text()) for p in sorted(folder.glob('*.html'))}
    for page in read.values():
        for link in page.links:
            other, _, anchor = link.partition('#')
            other = other.removeprefix('./')
            if re.match(r'\w+:', link) or (other and not other.endswith('.html')): continue
            there = read.get(other) if other else page
            if there is None: page.found.append(f'no such page: {link}')
            elif anchor and anchor not in there.anchors: page.found.append(f'no such place: {link}')
    return {name: page.found for name, page in read.items() if page.found}


def test_faults_of_rendered_pages_are_seen(tmp_path):
    good = '<h2 id="a">A</h2><img src="x.png" alt="A picture"><a href="#a">a</a><a href="https://x.y/#z">x</a><code>[a](b)</code>'
    (tmp_path/'good.html').write_text(good)
    links = '<a href="good.html#z">a</a><a href="none.html">b</a>'
    (tmp_path/'bad.html').write_text(f'<h3 id="b">EMA -</h3><img src="x.png">{links}<code>[a](https://x.y)</code>')
    assert list(faults(tmp_path)) == ['bad.html']
    assert [f.partition(':')[0] for f in faults(tmp_path)['bad.html']] == [
        'a heading with a dash', 'no alternative text', 'a raw link in code', 'no such place', 'no such page']


@pytest.mark.skipif(not (DOCS/'index.html').is_file(), reason='the site has not been rendered: make docs')
def test_rendered_pages_have_no_fault():
    assert faults(DOCS) == {}
