"Packaging: everything is read from settings.ini, which nbdev keeps; the two papermill notebooks travel with the package."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
EXTRAS = 'dev', 'dicom', 'dask', 'onnx', 'tensorboard', 'mlflow', 'wandb'
STATUS = {'3': 'Alpha', '4': 'Beta', '5': 'Production/Stable'}

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=(here / 'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=['cxrlg', 'cxrlg.notebooks'], package_dir={'cxrlg': 'cxrlg', 'cxrlg.notebooks': 'nbs'},
    package_data={'cxrlg': ['templates/*', 'py.typed'], 'cxrlg.notebooks': ['05_train.ipynb', '06_eval.ipynb']}, zip_safe=False,
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
    extras_require={name: cfg[f'{name}_requirements'].split() for name in EXTRAS},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    classifiers=[
        f"Development Status :: {cfg['status']} - {STATUS[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        'Operating System :: MacOS',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3 :: Only',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Topic :: Scientific/Engineering :: Medical Science Apps.',
        'Typing :: Typed',
    ],
    project_urls={
        'Documentation': f"{cfg['doc_host']}{cfg['doc_baseurl']}",
        'Changelog': f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
        'Issues': f"{cfg['git_url']}/issues",
    },
)
