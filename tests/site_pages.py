"""The pages of the site that are made from the code: names, parameters, commands. `python tests/site_pages.py` writes them again."""
import ast
import importlib
import inspect
import os
import re
from configparser import ConfigParser
from pathlib import Path

import nbformat
from fastcore.script import anno_parser

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
MADE = '<!-- Made by tests/site_pages.py: change the code, and run it again. -->'


def page(title, description, *parts):
    "A page of text from its title, description and parts"
    return f'---\ntitle: {title}\ndescription: "{description}"\n---\n\n{MADE}\n\n' + '\n\n'.join(parts).rstrip() + '\n'


def table(head, rows):
    lines = [' | '.join(str(o).replace('|', r'\|') for o in row) for row in rows]
    return '\n'.join([f'| {" | ".join(head)} |', '|---'*len(head) + '|', *[f'| {line} |' for line in lines]])


# ---- names

def rooms():
    "Module, file and title of every library notebook, in the order of reading"
    for path in sorted(NBS.glob('*.ipynb')):
        room = re.search(r'default_exp (\w+)', path.read_text())
        if path.name < '20' and room: yield room[1], path.name, re.match(r'# (.+)', nbformat.read(path, 4).cells[0].source)[1]


def public_part(module):
    "The statements of a room's cells that give names to readers, `#| export`: what `#| exporti` holds is on no page"
    file = next(file for room, file, _ in rooms() if room == module)
    sources = [c.source for c in nbformat.read(NBS/file, 4).cells if c.cell_type == 'code']
    return [node for source in sources if re.match(r'#\| *exports?\b', source) for node in ast.parse(source).body]


def documented(module):
    "Public name -> its sentence, or None for one that is not a function or class; methods that are patched in follow their class"
    body = public_part(module)
    said = {node.name: sentence(node) for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not is_patch(node)}
    methods = {}
    for node in body:
        if not isinstance(node, ast.FunctionDef) or not is_patch(node) or node.name.startswith('_'): continue
        methods.setdefault(ast.unparse(node.args.args[0].annotation), {})[node.name] = sentence(node)
    rows = {}
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    here = said.keys() | {target.id for target in targets if isinstance(target, ast.Name)}
    for name in sorted((name for name in here if not name.startswith('_')), key=lambda name: (name.lower(), name)):
        rows[name] = said.get(name)
        rows |= {f'{name}.{method}': says for method, says in sorted(methods.get(name, {}).items())}
    return rows


def is_patch(node): return any('patch' in ast.unparse(d) for d in node.decorator_list)


def sentence(node): return ' '.join((ast.get_docstring(node) or '').partition('\n\n')[0].split())


TASKS = {
    'Data': 'answers core label_files label_values readers sheets data phantom pictures dicom films batches',
    'Splits': 'splits',
    'Model': 'model maps features',
    'Loss': 'asl',
    'Couplings': 'graph tree convex couplings stability headroom evidence corrections controls',
    'Training': 'callbacks trackers programs config learner engines train study ablation',
    'Judging': 'checks delong eval calibration decisions recalibration power verdicts',
    'Studies and their reports': 'replicates results predictions units tables figures report kept evaluate',
    'Prediction': 'ensembles predict submissions localise export validate',
}


def task_rows(asked):
    "A row a public name of the rooms of one task: the name, its sentence, and the page that documents it"
    for module, file, title in rooms():
        if module not in asked: continue
        for name, says in documented(module).items():
            linked = f'`{name}`' if says is None else f'[`{name}`]({file}#{name.lower()})'
            yield linked, says or 'a constant', f'[{title}]({file})'


def command_rows():
    "A row a command: its name and its sentence"
    for name, function in commands():
        says = ' '.join(inspect.getdoc(function).partition('\n\n')[0].split())
        yield f'[`{name}`](command_line.qmd#{name})', says, '[All commands](command_line.qmd)'


def names_page():
    asked = {task: some.split() for task, some in TASKS.items()}
    lost = {module for module, *_ in rooms() if documented(module)} - {module for some in asked.values() for module in some}
    if lost: raise ValueError(f'{sorted(lost)}: give each room a task in TASKS')
    made = {task: list(task_rows(some)) for task, some in asked.items()} | dict(Commands=list(command_rows()))
    parts = [f'## {task}\n\n' + table(('name', 'what it is', 'page'), rows) for task, rows in made.items()]
    said = 'Every function, class and constant that the library gives to its readers, by what one wants to do.'
    first = ('By task, and within a task in the order in which its pages are read. '
             'A name is imported from its room: `from cxrlg.splits import make_folds`; [the map of the house](house.qmd) has the rooms.')
    return page('All public names', said, first, *parts)


# ---- parameters

def groups(config):
    "Name of a parameter -> the comment that begins its group in the configuration's class"
    group, found = '', {}
    for line in inspect.getsource(config).splitlines():
        if m := re.fullmatch(r' {4}# (\w+)', line): group = m[1]
        if m := re.match(r' {4}(\w+):', line): found[m[1]] = group
    return found


def parameters_page():
    from cxrlg.train import TrainConfig
    about, group = TrainConfig.table(), groups(TrainConfig)
    place = next(file for module, file, _ in rooms() if 'TrainConfig' in documented(module))
    parts = []
    for g in dict.fromkeys(group[name] for name in about.index):
        rows = [(f'`{name}`', f'`{r["default"]!r}`', r['meaning'], r['rule']) for name, r in about.iterrows() if group[name] == g]
        parts.append(f'## {g.capitalize()}\n\n' + table(('parameter', 'default', 'meaning', 'what it may be'), rows))
    first = ('A study\'s YAML, papermill\'s `-p` and [`TrainConfig`](' + place + '#trainconfig) use these names. '
             'In a YAML `arms`, `seeds` and `folds` are lists in place of `arm`, `seed` and `fold`. '
             'Which to turn first is [a page of its own](20_knobs.ipynb).')
    said = 'Every parameter of a fold and so of a study: its default, its meaning, and what it may be.'
    return page('All parameters', said, first, *parts)


# ---- commands

def commands():
    "Name of each command and its function"
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    for entry in cfg['DEFAULT']['console_scripts'].split():
        name, where = entry.split('=')
        module, function = where.split(':')
        yield name, getattr(importlib.import_module(module), function)


def help_of(name, function):
    "What a command prints with --help, at a width of a hundred characters"
    before = os.environ.get('COLUMNS')
    os.environ['COLUMNS'] = '100'
    try: return anno_parser(function, prog=name).format_help().strip()
    finally:
        if before is None: del os.environ['COLUMNS']
        else: os.environ['COLUMNS'] = before


def commands_page():
    parts = [f'## {name}\n\n```\n{help_of(name, function)}\n```' for name, function in commands()]
    first = ('Where the commands lie is said in [Run it on your films](run.qmd), '
             'and how they are made in [The commands](09_commands.ipynb). '
             'What they refuse, and the cure, is in [When something goes wrong](faq.qmd).')
    return page('All commands', 'What is typed at a terminal, and what each command answers to --help.', first, *parts)


def pages():
    "File -> text of the pages that are made"
    return {'names.qmd': names_page(), 'parameters.qmd': parameters_page(), 'command_line.qmd': commands_page()}


if __name__ == '__main__':
    for file, text in pages().items(): (NBS/file).write_text(text)
