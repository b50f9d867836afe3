"A study on a cluster: the documented commands, the local bytes, workers that die, a study that is stopped, and what is refused."
import concurrent.futures
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import yaml

from conftest import ROOT
from cxrlg import engines, study
from cxrlg.core import DataError
from cxrlg.config import TrainConfig
from cxrlg.train import train_fold
from test_study import TINY, are_gone, notebooks_of, stop, wait_until

SMALL = TINY | dict(study='small', epochs=50)
BIN = Path(sys.executable).parent


def documented(word):
    "The shell commands of the notebook's last section that hold `word`"
    text = '\n'.join(c.source for c in nbformat.read(ROOT/'nbs'/'07_study.ipynb', 4).cells if c.cell_type == 'markdown')
    return [line for block in re.findall(r'```sh\n(.*?)```', text, flags=re.S) for line in block.splitlines() if word in line]


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    "Runs a documented command with this machine's address and folder in its place; ends what it started"
    pytest.importorskip('distributed', reason='pip install cxrlg[dask]')
    shared, started = tmp_path_factory.mktemp('shared'), []
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    def run(line, **change):
        here = {
            '10.0.0.1': '127.0.0.1',
            '8786': port,
            '/shared': str(shared),
            '--port': '--host 127.0.0.1 --dashboard-address 127.0.0.1:0 --port',
        }
        for old, new in (here | change).items(): line = line.replace(old, new)
        words = shlex.split(line)
        log = open(shared/f'{len(started)}.log', 'w')
        process = subprocess.Popen(
            [BIN / words[0], *words[1:]],
            cwd=shared,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | dict(PYTHONWARNINGS='ignore'),
        )
        started.append(process)
        return process, shared/log.name
    run.shared, run.address, run.started = shared, f'tcp://127.0.0.1:{port}', started
    (shared/'small.yaml').write_text(yaml.safe_dump(SMALL))
    run(documented('dask scheduler')[0])
    workers, log = run(documented('dask worker')[0], **{'--nworkers 4': '--nworkers 2'})
    client = engines._connect(run.address)
    wait_until(lambda: len(client.scheduler_info()['workers']) == 2, workers, log)
    client.close()
    yield run
    for process in started:
        if process.poll() is None: process.terminate()
    for process in started: process.wait(60)


class InThread:
    "A call that runs beside the test, as `wait_until` wants it"
    def __init__(self, call):
        self.future = concurrent.futures.Future()
        def run():
            try: self.future.set_result(call())
            except BaseException as e: self.future.set_exception(e)
        threading.Thread(target=run, daemon=True).start()
    def poll(self): return self.future.exception() or 0 if self.future.done() else None
    def result(self, seconds): return self.future.result(seconds)


def bytes_of(folder): return [(folder/name).read_bytes() for name in ('model.safetensors', 'oof.parquet')]


def test_a_study_on_two_workers_is_stopped_then_loses_a_worker_and_has_the_local_bytes(cluster, tmp_path, monkeypatch):
    (command,) = documented('--engine dask')
    folds = [cluster.shared/'runs'/'small'/'none'/'seed42'/f'fold{k}' for k in (0, 1)]

    epoch = lambda: torch.load(folds[0]/'checkpoint.pt', weights_only=True)
    going, log = cluster(command + ' --override folds=[0]', nih128='small')
    wait_until(lambda: notebooks_of(folds) and (folds[0]/'checkpoint.pt').is_file(), going, log)
    held = notebooks_of(folds)
    stop(going, signal.SIGINT, log)
    are_gone(held)
    before = epoch()['epoch']

    monkeypatch.setattr(study, 'evaluate', lambda *_: pd.DataFrame())
    going = InThread(
        lambda: study.run_study(
            cluster.shared / 'small.yaml',
            out_dir=str(cluster.shared / 'runs'),
            engine='dask',
            scheduler=cluster.address,
            bar=False,
        )
    )
    wait_until(lambda: len(notebooks_of(folds)) == 2 and epoch()['epoch'] > before, going, log)
    assert len({p.ppid() for p, _ in notebooks_of(folds)}) == 2, 'each worker trains one fold'
    (runner, kernels), = notebooks_of(folds[:1])
    lost = runner.parent()
    lost.kill()
    are_gone([(runner, kernels)])
    kept = epoch()['history']
    assert 0 < len(kept) < 50
    assert going.result(300).empty

    rows = [line.split(',') for line in (folds[0]/'history.csv').read_text().splitlines()]
    assert [int(r[0]) for r in rows[1:]] == list(range(1, 51)), 'every epoch once'
    assert [float(r[rows[0].index('seconds')]) for r in rows[1 : len(kept) + 1]] == pytest.approx(
        [r['seconds'] for r in kept]
    ), 'finished epochs were not trained again'
    assert json.loads((folds[0]/'job.json').read_text())['worker'] != f'{socket.gethostname()}:{lost.pid}'
    for k, folder in enumerate(folds):
        train_fold(TrainConfig(**{k: v for k, v in SMALL.items() if k != 'arms'}, fold=k, out_dir=str(tmp_path)), bar=False)
        assert bytes_of(folder) == bytes_of(tmp_path/'small'/'none'/'seed42'/f'fold{k}')
        assert not [f.name for f in folder.iterdir() if '.tmp-' in f.name or f.name in ('lock', 'checkpoint.pt')]


def test_a_worker_that_offers_a_gpu_gets_the_jobs(cluster):
    mark = (cluster.shared/'small.yaml', (cluster.shared/'small.yaml').read_text(), engines.mark_versions())
    client = engines._connect(cluster.address)
    assert engines._check_workers(client, mark) is None
    gpu, log = cluster(documented('GPU=1')[0], **{'--nworkers 2': '--nworkers 1'})
    wait_until(lambda: len(client.scheduler_info()['workers']) == 3, gpu, log)
    assert engines._check_workers(client, mark) == {'GPU': 1}
    with pytest.raises(DataError, match='does not see'): engines._check_workers(client, (mark[0], 'another study', mark[2]))
    gpu.terminate()
    wait_until(lambda: len(client.scheduler_info()['workers']) == 2, cluster.started[1], log)
    client.close()


def test_a_job_that_kills_its_workers_fails_and_is_not_waited_for():
    distributed = pytest.importorskip('distributed', reason='pip install cxrlg[dask]')
    import dask
    from joblib import Parallel, delayed, parallel_config
    with dask.config.set({'distributed.scheduler.allowed-failures': 0}), distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as here, distributed.Client(here) as client:
        with parallel_config(engines._dask_backend(client)):
            lines = list(
                Parallel(return_as='generator_unordered', batch_size=1)([delayed(os._exit)(3), delayed(abs)(-2)])
            )
    assert len(lines) == 2
    line, = [line for line in lines if str(line).startswith('3: ')]
    assert re.fullmatch(
        "3: Dask gave it up: KilledWorker: Attempted to run task '.*' on 1 different workers, but all those workers died while running it",
        line,
    )


def test_what_is_missing_is_said_in_one_line(monkeypatch, tmp_path):
    ask = lambda **more: study.run_study(SMALL, out_dir=str(tmp_path), bar=False, **more)
    with pytest.raises(DataError, match='local, dask'): ask(engine='slurm')
    monkeypatch.setattr(engines, '_CONNECT_S', 2)
    if importlib.util.find_spec('distributed'):
        with pytest.raises(DataError, match='needs scheduler=ADDRESS'): ask(engine='dask')
        with pytest.raises(DataError, match='no Dask scheduler answers at tcp://127.0.0.1:9') as e:
            ask(engine='dask', scheduler='tcp://127.0.0.1:9')
        assert '\n' not in str(e.value)
    monkeypatch.setitem(sys.modules, 'distributed', None)
    with pytest.raises(DataError, match=r'pip install cxrlg\[dask\]'): ask(engine='dask', scheduler='tcp://127.0.0.1:9')
    assert list(tmp_path.iterdir()) == []


def test_each_job_of_a_host_has_a_gpu_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(engines, '_gpus', lambda: ['0', '3'])
    monkeypatch.setattr(engines.tempfile, 'gettempdir', lambda: str(tmp_path))
    monkeypatch.setattr(engines.time, 'sleep', lambda s, sleep=time.sleep: sleep(.02))
    at_once, most, seen, gate = set(), [], [], threading.Lock()
    def job():
        with engines._own_gpu() as gpu:
            with gate:
                assert gpu not in at_once
                at_once.add(gpu)
                seen.append(gpu)
                most.append(len(at_once))
            threading.Event().wait(.1)
            with gate: at_once.remove(gpu)
    jobs = [threading.Thread(target=job) for _ in range(6)]
    for j in jobs: j.start()
    for j in jobs: j.join()
    assert len(seen) == 6 and set(seen) == {'0', '3'} and max(most) == 2
    monkeypatch.setattr(engines, '_gpus', lambda: [])
    with engines._own_gpu() as gpu: assert gpu is None


def test_the_gpus_are_those_that_the_environment_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(DataError, match='2 GPUs that PyTorch .* cannot use') as e: engines._gpus()
    assert '\n' not in str(e.value)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for named, gpus in ((None, ['0', '1']), ('2,5', ['2', '5']), ('GPU-a, GPU-b', ['GPU-a', 'GPU-b'])):
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
        if named: monkeypatch.setenv('CUDA_VISIBLE_DEVICES', named)
        assert engines._gpus() == gpus
    assert engines.jobs_and_gpus(1, None) == (2, ['GPU-a', 'GPU-b'])
