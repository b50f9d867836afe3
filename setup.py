"Packaging: everything is read from settings.ini, which nbdev keeps; the two papermill notebooks travel with the package."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=(here / 'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=['cxrlg', 'cxrlg.notebooks'], package_dir={'cxrlg': 'cxrlg', 'cxrlg.notebooks': 'nbs'},
    package_data={'cxrlg': ['templates/*'], 'cxrlg.notebooks': ['05_train.ipynb', '06_eval.ipynb']}, zip_safe=False,
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
    extras_require={name: cfg[f'{name}_requirements'].split() for name in ('dev', 'dicom', 'dask', 'onnx')},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    classifiers=['Development Status :: 4 - Beta', 'Intended Audience :: Science/Research', 'Programming Language :: Python :: 3.11',
                 'Programming Language :: Python :: 3.12', 'Topic :: Scientific/Engineering :: Medical Science Apps.'])
