"""`python tests/bench_evaluate.py [FILMS] [OPTIONS of cxrlg_evaluate]`: time and memory of cxrlg_evaluate on made-up predictions.
Three models score 14 findings of 250,000 films, unless another number is given. Seconds of the processor do not change on a busy machine.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit

from cxrlg.data import CHEXPERT
from cxrlg.eval import simulate

SHARE = [.3, .08, .12, .4, .05, .25, .1, .04, .15, .09, .38, .02, .04, .45]
RUN = 'from cxrlg.commands import evaluate\nevaluate()\n'


def write_tables(folder, n):
    "Labels and the predictions of three models, as CSV; the number of patients"
    y, z, patients = (x[:n] for x in simulate(n // 2, SHARE, np.linspace(1, 2, 14)))
    rng, of = np.random.default_rng(1), int(patients.max()) + 1
    films = pd.DataFrame(dict(image=[f'f{i:06d}.png' for i in range(n)]))
    people = dict(patient=patients, sex=rng.choice(['F', 'M'], of)[patients], age=rng.normal(55, 18, of).clip(0, 95).round()[patients])
    labels = films.assign(**people, view=rng.choice(['AP', 'PA'], n), fold=patients % 3)
    labels.join(pd.DataFrame(y.astype(int), columns=CHEXPERT)).to_csv(folder/'labels.csv', index=False)
    for model in ('base', 'one', 'two'):
        scores = expit(z + .4 * rng.normal(size=z.shape)).round(6)
        films.join(pd.DataFrame(scores, columns=CHEXPERT)).to_csv(folder/f'{model}.csv', index=False)
    return of


def main(n=250_000, *options):
    with tempfile.TemporaryDirectory() as tmp:
        patients, start = write_tables(Path(tmp), int(n)), time.perf_counter()
        (Path(tmp)/'cxrlg_evaluate').write_text(RUN)
        files = ['base.csv', 'one.csv', 'two.csv', '--labels', 'labels.csv', '--out', 'out']
        subprocess.run([sys.executable, 'cxrlg_evaluate', *files, *options], cwd=tmp, check=True)
        used, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    print(f'{int(n):,} films of {patients:,} patients, 14 findings, 3 models, {os.cpu_count()} processors: {wall:.0f} s, '
          f'{used.ru_utime + used.ru_stime:.0f} s of a processor, {used.ru_maxrss / 1e6:.2f} GB at most')


if __name__ == '__main__': main(*sys.argv[1:])
