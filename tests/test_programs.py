"Programs: what papermill is asked for is all that runs, one fork a notebook, and none outlives who asked for it."
import subprocess
import sys
import types

import nbformat
import psutil
import pytest
import torch

from cxrlg import learner, train
from cxrlg.core import DataError
from cxrlg.programs import Programs
from cxrlg.results import example_study
from cxrlg.learner import resolve_amp, train_device

TINY = dict(study='tiny', data_args={'n_patients': 40}, size=32, n_splits=2, arch='test_resnet', arch_args={}, epochs=1, bs=8, threads=1)


def after_the_job(path):
    "Outputs of the cells up to the one that ends the job, and of those after it"
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code']
    last = next(i for i, c in enumerate(cells) if 'skip_rest()' in c.source)
    return [o for c in cells[:last + 1] for o in c.outputs], [o for c in cells[last + 1:] for o in c.outputs]


@pytest.mark.slow
def test_with_parameters_only_the_job_runs(tmp_path):
    "The pages themselves show their demonstrations: their saved outputs are checked by the house rules"
    example_study(tmp_path/'example', 100)
    with Programs() as programs:
        assert programs('05_train', tmp_path/'fold.ipynb', TINY | dict(out_dir=str(tmp_path))) is None
        assert programs('06_eval', tmp_path/'study.ipynb', dict(study='example', out_dir=str(tmp_path), n_boot=20)) is None
    for name in ('fold', 'study'):
        job, rest = after_the_job(tmp_path/f'{name}.ipynb')
        assert job and not rest
        assert any('image/png' in o.get('data', {}) for o in job), 'the job shows its figures'
    assert (tmp_path/'tiny'/'none'/'seed42'/'fold0'/'done.json').is_file() and (tmp_path/'example'/'report.html').is_file()


@pytest.mark.slow
def test_a_process_that_is_ready_ends_with_who_asked_for_it(tmp_path):
    code = 'import time; from cxrlg.programs import Programs; p = Programs(); print(p.process.pid, flush=True); time.sleep(600)'
    asks = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    ready = psutil.Process(int(asks.stdout.readline()))
    asks.kill()
    asks.wait()
    gone, left = psutil.wait_procs([ready], 60)
    assert gone or left[0].status() == psutil.STATUS_ZOMBIE


def test_a_process_that_died_is_said_in_one_line(tmp_path):
    with Programs() as programs:
        programs.process.kill()
        programs.process.wait()
        said = programs('05_train', tmp_path/'fold.ipynb', TINY)
    assert said.startswith(f'{tmp_path}/fold.ipynb: papermill could not write the notebook') and '\n' not in said


@pytest.mark.parametrize(
    'asked, capability, means',
    [
        ('auto', (8, 0), 'bf16'),
        ('auto', (9, 0), 'bf16'),
        ('auto', (7, 5), 'fp16'),
        ('no', (9, 0), 'no'),
        ('fp16', (7, 5), 'fp16'),
    ],
)
def test_precision_on_a_gpu(monkeypatch, asked, capability, means):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert resolve_amp(asked, torch.device('cuda')) == means


@pytest.mark.parametrize('avx512, amx, means', [(True, False, 'bf16'), (False, True, 'bf16'), (False, False, 'no')])
def test_precision_on_a_processor(monkeypatch, avx512, amx, means):
    monkeypatch.setattr(learner.platform, 'machine', lambda: 'x86_64')
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx512)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
    assert resolve_amp('auto', torch.device('cpu')) == means


def test_precision_on_an_arm_processor(monkeypatch):
    monkeypatch.setattr(learner.platform, 'machine', lambda: 'aarch64')
    for flags, means in ((['fp', 'bf16'], 'bf16'), (['fp'], 'no'), ([], 'no')):
        monkeypatch.setattr(learner, '_cpu_flags', lambda: flags)
        assert resolve_amp('auto', torch.device('cpu')) == means


def test_bf16_that_is_emulated_warns_with_its_cost(monkeypatch):
    monkeypatch.setattr(learner, 'cpu_computes_bf16', lambda: False)
    with pytest.warns(match='nine times slower'): assert resolve_amp('bf16', torch.device('cpu')) == 'bf16'


@pytest.mark.parametrize('device', ['cuda', 'mps'])
def test_a_device_that_is_not_there_is_refused(monkeypatch, device):
    monkeypatch.setattr(torch.backends, 'mps', types.SimpleNamespace(is_available=lambda: False))
    with pytest.raises(DataError, match=f'device={device} is not available'): train_device(device)
    assert train_device('').type == 'cpu'


def test_apples_device_is_used_when_asked_for_and_never_by_itself(monkeypatch):
    monkeypatch.setattr(torch.backends, 'mps', types.SimpleNamespace(is_available=lambda: True))
    assert train_device('').type == 'cpu' and train_device('mps').type == 'mps'
    assert resolve_amp('auto', torch.device('mps')) == 'no'
    with pytest.raises(DataError, match='not supported on mps'): resolve_amp('bf16', torch.device('mps'))


@pytest.mark.slow
def test_compiled_blocks_train_what_plain_ones_do(tmp_path):
    "torch.compile on the CPU: the same network to rounding, or one line where there is no compiler"
    plain = train.train_fold(TINY | dict(out_dir=str(tmp_path/'a'), amp='no'), bar=False)
    try: compiled = train.train_fold(TINY | dict(out_dir=str(tmp_path/'b'), amp='no', compile=True), bar=False)
    except DataError as e: assert 'compile=true failed on cpu' in str(e) and '\n' not in str(e)
    else: assert abs(compiled.auc - plain.auc) < .02
