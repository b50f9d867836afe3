"""`make notebooks [NB=05_train]`: run notebooks from top to bottom, slow cells too.
Their outputs are saved with the hash of the code that printed them; warnings and progress bars on standard error are not kept."""

import ast
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NBS = Path(__file__).resolve().parents[1] / 'nbs'


def only_imports(source):
    "Does a cell do nothing but import? Such a cell prints nothing: a name that moved to another room leaves outputs fresh"
    try: body = ast.parse(source).body
    except SyntaxError: return False
    return bool(body) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def code_hash(nb):
    """Hash of a notebook's code cells but its imports, in order: outputs are fresh when it is the stored one.
    Which names are public, and what a caption says, prints nothing: `exporti` is read as `export`, captions are left out"""
    sources = [c.source for c in nb.cells if c.cell_type == 'code' and not only_imports(c.source)]
    sources = [re.sub(r'^#\| *exporti\b', '#| export', source) for source in sources]
    sources = [re.sub(r'^#\| *(?:fig|tbl)-(?:cap|alt): .*\n', '', source, flags=re.M) for source in sources]
    return hashlib.sha256('\0'.join(sources).encode()).hexdigest()[:16]


def run(path):
    "Execute one notebook in its folder and write it back, without standard error"
    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=None, kernel_name='python3', resources={'metadata': {'path': str(NBS)}}).execute()
    for cell in (c for c in nb.cells if c.cell_type == 'code'):
        cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
    nb.metadata['cxrlg'] = {'outputs_of': code_hash(nb)}
    nbformat.write(nb, path)
    subprocess.run([Path(sys.executable).parent/'nbdev_clean', '--fname', path], check=True)


if __name__ == '__main__':
    for path in [NBS/f'{name}.ipynb' for name in sys.argv[1:]] or sorted(NBS.glob('*.ipynb')):
        print(path.name, flush=True)
        run(path)
