"""How the site shows the library's names: parameters as tables, links to what is documented. nbdev calls it; no room imports it."""
import ast
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Annotated, get_args, get_origin

from fastcore.docments import docments
from nbdev.doclinks import NbdevLookup
from nbdev.showdoc import BasicMarkdownRenderer

_NONE = inspect.Parameter.empty
_MANY = 14


def _cell(text):
    "Text for one cell of a Markdown table"
    return ' '.join(str(text).split()).replace('|', r'\|')

def _type(note):
    "An annotation as its reader says it: `str`, `DataFrame`, `str or dict`"
    if note in (_NONE, None, type(None)): return ''
    if get_origin(note) is Annotated: note = get_args(note)[0]
    if isinstance(note, str): return note.strip('"\'').replace('|', ' or ')
    if isinstance(note, type) and not get_args(note): return note.__name__
    return re.sub(r'\b[\w.]+\.(?=\w)', '', str(note)).replace(' ', '').replace('|', ' or ')

def _default(value):
    if value is _NONE: return ''
    if getattr(value, '__name__', None): return value.__name__
    shown = repr(value)
    return 'made anew' if '<' in shown else shown

def _meaning(note, docment):
    "What a parameter means: its comment, or what its annotation says of it"
    said = [o if isinstance(o, str) else getattr(o, 'says', '') for o in get_args(note)[1:]] if get_origin(note) is Annotated else []
    return '; '.join(o for o in reversed(said) if o) if len(said) == 2 else docment or ''

def _signature(name, parameters):
    "The call in one line, or in short when it has many parameters"
    named = [p for p in parameters if p.name != 'self']
    shown = [str(p.replace(annotation=_NONE)) for p in named]
    inside = ', '.join(shown) if len(shown) <= _MANY and '<' not in ''.join(shown) else '...'
    return f'{name}({inside})'

def parameter_rows(
    symbol, # function or class
) -> list: # name, type, default and meaning of each parameter; last of all what is returned, where that is said
    "The parameters of a function or class with their comments"
    try: signature = inspect.signature(symbol, eval_str=True)
    except (ValueError, TypeError, NameError): return []
    said = docments(symbol, full=True, args_kwargs=True)
    rows = []
    for p in signature.parameters.values():
        if p.name == 'self': continue
        about = said.get(p.name) or {}
        name = str(p).partition(':')[0].partition('=')[0]
        rows.append((name, _type(p.annotation), _default(p.default), _meaning(p.annotation, about.get('docment'))))
    back = said.get('return') or {}
    if back.get('docment'): rows.append(('returns', _type(signature.return_annotation), '', back['docment']))
    return rows


def _row(row):
    "A line of the table from name, type, default and meaning"
    name, kind, default, meaning = row
    named = '**returns**' if name == 'returns' else f'`{name}`'
    return f'| {named} | {_code(kind)} | {_code(default)} | {_cell(meaning)} |'

def _code(text): return f'`{_cell(text)}`' if text else ''


class ParameterTable(BasicMarkdownRenderer):
    "A name's heading, link to its source, call, sentence, and parameters as a table"
    def _repr_markdown_(self):
        source = NbdevLookup().code(self.fn)
        link = f'[source]({source}){{target="_blank" style="float:right; font-size:smaller"}}\n\n' if source else ''
        call = _signature(self.nm, self.sig.parameters.values()) if self.sig else self.nm
        doc = f'---\n\n{link}{"#"*self.title_level} {self.nm}\n\n```python\n{call}\n```\n\n'
        sentence = (self.docs or '').strip().partition('\n\n')[0]
        return doc + (f'*{sentence}*\n\n' if sentence else '') + self._table()

    def _table(self):
        rows = parameter_rows(self.sym)
        if not any(meaning for *_, meaning in rows): return ''
        return '\n'.join(['| parameter | type | default | meaning |', '|---|---|---|---|', *map(_row, rows)]) + '\n'


@cache
def public_names():
    "All names that the rooms give away: those in their `__all__`"
    names = set()
    for path in Path(__file__).parent.glob('[a-z]*.py'):
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__': names |= set(ast.literal_eval(node.value))
    return names

_TO_NAME = re.compile(r'\[(`[^`\]]+`)\]\(https?://[^()\s]*/\w+\.html#([\w.]+)\)(?:\{[^{}]*\})?')

def _only_known(text):
    known = {name.lower() for name in public_names()}
    return _TO_NAME.sub(lambda m: m[0] if m[2].partition('.')[0].lower() in known else m[1], text)

def unlink_private(cell):
    "nbdev's processor of one cell: names that no page documents are code, and no link to a place that is not there"
    if cell.cell_type == 'markdown' and cell.get('source'): cell.source = _only_known(cell.source)
    for out in cell.get('outputs', []):
        shown = out.get('data', {})
        if 'text/markdown' in shown: shown['text/markdown'] = [_only_known(line) for line in shown['text/markdown']]
