"The repository's face: workflows, forms and texts for those who join, and the site's pages as far as their sources show it."
import ast
import configparser
import os
import pickle
import re

import pytest
import yaml

from conftest import ROOT
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
        for step in job['steps']: assert set(step) <= {'name', 'id', 'if', 'uses', 'with', 'run', 'env'} and ('uses' in step) != ('run' in step)


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


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_no_line_of_the_library_is_longer_than_140(path):
    claim, *lines = path.read_text().splitlines()
    assert [line for line in lines if len(line) > 140] == [] and claim.startswith('"""')


def test_the_package_says_that_it_is_typed():
    assert (ROOT/'cxrlg'/'py.typed').is_file()
    setup = (ROOT/'setup.py').read_text()
    assert "'py.typed'" in setup and "'Typing :: Typed'" in setup
    assert f"'{settings()['status']}': " in setup, 'settings.ini and the classifier are one status'


# ---- SECURITY.md

UNSAFE = re.compile(r'\ballow_pickle=True\b|\b(pickle|marshal|shelve|dill|cloudpickle)\.loads?\b|\bjoblib\.load\b|\byaml\.(unsafe_|full_)?load\(|\bread_pickle\b')


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_nothing_loads_pickled_code(path):
    text = path.read_text()
    assert not UNSAFE.search(text)
    for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
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
