"""Fixtures shared by the tests: where the real films are, and a small phantom study's parts."""
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.torch_core import defaults

from cxrlg.corrections import Outputs
from cxrlg.eval import simulate

ROOT = Path(__file__).resolve().parents[1]

MARKS = dict(slow='takes more than a few seconds', dask='needs Dask', films='needs the real films', gpu='needs a CUDA GPU')
SLOW = {'test_ablation', 'test_controls', 'test_couplings', 'test_coverage', 'test_engines', 'test_evaluate',
        'test_export', 'test_features', 'test_gpu', 'test_house', 'test_kill', 'test_localise', 'test_predict',
        'test_report', 'test_results', 'test_study', 'test_tables', 'test_trackers', 'test_train', 'test_validate'}


# Single tests of quick files that take more than four seconds: full-size tables, every correction at its hardest.
SLOW_TESTS = {
    'test_the_phase_diagram_is_the_same_whatever_the_number_of_processes',
    'test_a_table_of_the_size_of_nih_takes_less_than_a_minute',
    'test_the_interval_covers_the_films_that_were_not_drawn',
    'test_no_torch',
    'test_a_damaged_kept_study_is_refused_in_one_line',
    'test_every_correction_is_finite_on_hard_input',
    'test_a_fold_is_corrected_without_its_own_targets',
    'test_full_size_is_fast_and_small',
    'test_full_size_stays_below_a_gigabyte',
    'test_a_million_rows',
    'test_nih_complete',
    'test_chexpert_full_size',
    'test_padchest_full_size',
    'test_one_patient_and_memory',
    'test_any_size',
    'test_size_and_evidence_leave_the_labels_alone',
    'test_a_fold_has_the_same_bytes',
}


def pytest_configure(config):
    for name, says in MARKS.items(): config.addinivalue_line('markers', f'{name}: {says}')


def pytest_collection_modifyitems(items):
    "Files of long tests are slow as a whole, and begin first; some tests of others are slow by name; `make quick` leaves them out"
    items.sort(key=lambda item: item.module.__name__ not in SLOW)
    for item in items:
        room = item.module.__name__
        if room in SLOW or item.originalname in SLOW_TESTS: item.add_marker('slow')
        if room == 'test_engines': item.add_marker('dask')
        if room == 'test_gpu': item.add_marker('gpu')
        if 'films' in item.fixturenames: item.add_marker('films')


# A shell ignores SIGINT for what it starts in the background, and commands inherit that: those that a test stops would not hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope='module', autouse=True)
def on_the_cpu(request):
    "Sums on a CPU are the same each time, so all tests are of the CPU, also of the commands they start, but those of `test_gpu.py`"
    with pytest.MonkeyPatch.context() as m:
        if request.module.__name__ != 'test_gpu':
            m.setenv('CUDA_VISIBLE_DEVICES', '')
            m.setattr(torch.cuda, 'is_available', lambda: False)
            m.setattr(torch.cuda, 'device_count', lambda: 0)
            m.setattr(defaults, 'use_cuda', False)
        yield


@pytest.fixture(scope='session')
def films():
    "The folder of real chest films (`$CXRLG_DATA`, or `../shared/data` beside the repository); skips when absent"
    folder = Path(os.environ.get('CXRLG_DATA', ROOT.parent / 'shared' / 'data'))
    if not (folder / 'nih128').is_dir(): pytest.skip(f'no real films in {folder}: set CXRLG_DATA')
    return folder


@pytest.fixture(scope='module')
def four_findings():
    "Simulated out-of-fold logits of four findings, two seeds and two views"
    y, z, patients = simulate(500, [.3, .2, .1, .25], [1.5, 1.2, 1.8, 1.], seed=5)
    two = np.stack([z, z + .3*np.random.default_rng(0).normal(size=z.shape)])
    return Outputs(y, two, patients, patients % 3, list('ABCD'), context=np.where(patients % 2, 'AP', 'PA'))
