"A fold that is killed at any moment and started again ends with the same bytes; a second process is told who is at it."

import errno
import fcntl
import json
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cxrlg import engines, model
from cxrlg.core import DataError
from cxrlg.films import PixelCache
from cxrlg.callbacks import EpochSeed
from cxrlg.train import fold_lock, train_fold

TINY = dict(study='t', data_args={'n_patients': 40}, size=32, n_splits=3, arch='test_resnet', arch_args={}, bs=8, epochs=3, threads=1)
BYTES = ('model.safetensors', 'oof.parquet')
STEPS = {'none': 30, 'prox': 10}
processes = multiprocessing.get_context('forkserver')
processes.set_forkserver_preload(['cxrlg.train'])


def config(arm, out): return TINY | dict(arm=arm, accum=30//STEPS[arm], out_dir=str(out))
def folder(arm, out): return out/'t'/arm/'seed42'/'fold0'
def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)


def at(n, act=die, name=None, then=False):
    "A wrapper of functions: at the n-th call (to do with the file `name`) `act` takes place, before the function or (`then`) after"
    calls = []
    def wrapper(f):
        def call(*args, **kwargs):
            if name is None or Path(args[-1]).name == name: calls.append(args)
            now = len(calls) == n and calls[-1] is args
            if now and not then: act(*args, **kwargs)
            out = f(*args, **kwargs)
            if now and then: act()
            return out
        return call
    return wrapper


def half_a_checkpoint(state, f):
    "What is on the disk when a process dies in the middle of writing a checkpoint"
    torch.serialization.save(state, f)
    f.flush()
    os.truncate(f.name, os.path.getsize(f.name) // 2)
    die()


def half_of_the_weights(state, path):
    "safetensors writes to a file of its own making first"
    (Path(path).parent/'.tmpQ7x2Lk').write_bytes(b'half')
    die()


def arrange(where, n, name=None):
    "Let this process die at the n-th time it comes to a place"
    if where == 'step': torch.optim.AdamW.step = at(n)(torch.optim.AdamW.step)
    elif where == 'in a checkpoint': torch.save = at(n, half_a_checkpoint)(torch.save)
    elif where == 'in the weights': model.save_file = at(n, half_of_the_weights)(model.save_file)
    elif where == 'after the rename': os.replace = at(n, name=name, then=True)(os.replace)
    else: setattr(os, where, at(n, name=name)(getattr(os, where)))


def child(arm, out, log, kill):
    "Train a fold, note every epoch that is begun, and die as arranged"
    real = EpochSeed.before_train
    def before_train(self):
        with open(log, 'a') as f: f.write(f'{self.epoch} ')
        real(self)
    EpochSeed.before_train = before_train
    if kill and kill[0] != 'clock': arrange(*kill)
    train_fold(config(arm, out), bar=False)


def start(arm, out, log, kill=None):
    "One process from its start to its end; its exit status and the epochs it began"
    log.write_text('')
    p = processes.Process(target=child, args=(arm, out, log, kill))
    p.start()
    if kill and kill[0] == 'clock':
        time.sleep(kill[1])
        p.kill()
    p.join()
    return p.exitcode, [int(e) for e in log.read_text().split()]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "Of each arm: the bytes, the files, and how long it took"
    def one(arm):
        out = tmp_path_factory.mktemp(arm)
        began = time.perf_counter()
        assert start(arm, out, out/'log') == (0, [0, 1, 2])
        return {n: (folder(arm, out)/n).read_bytes() for n in BYTES}, files(out), time.perf_counter() - began
    warm_up = processes.Process(target=time.sleep, args=(0,))
    warm_up.start()
    warm_up.join()
    return {arm: one(arm) for arm in STEPS}


def files(out): return {p.relative_to(out).as_posix() for p in out.rglob('*')} - {'log'}


def plan(seed=0):
    "Twenty moments and more, some in a process that goes on after an earlier one: [(arm, [(place, which time, file)])]"
    rng = random.Random(seed)
    moments = [[('clock', round(rng.uniform(.1, .9), 2))] for _ in range(3)] + [[('step', rng.randint(1, 10))] for _ in range(3)]
    moments += [[('in a checkpoint', 1), ('step', 2)], [('in a checkpoint', 3)], [('in the weights', 1)]]
    moments += [
        [('fsync', rng.randint(2, 4))],
        [('fsync', rng.randint(5, 9))],
        [('replace', 1, 'folds.csv')],
        [('replace', 2, 'checkpoint.pt'), ('replace', 1, 'checkpoint.pt')],
    ]
    moments += [
        [('after the rename', 2, 'checkpoint.pt'), ('after the rename', 1, 'checkpoint.pt')],
        [('after the rename', 1, 'oof.parquet')],
        [('replace', 1, 'done.json'), ('replace', 1, 'done.json')],
    ]
    moments += [[('after the rename', 1, 'done.json')], [('unlink', 1, 'checkpoint.pt')], [('unlink', 1, 'lock')]]
    return [
        pytest.param(('none', 'prox')[k % 2], kills, id=', then '.join(' '.join(map(str, kill)) for kill in kills))
        for k, kills in enumerate(moments)
    ]


def test_the_plan_has_twenty_moments(): assert sum(len(p.values[1]) for p in plan()) >= 20


@pytest.mark.parametrize('arm,kills', plan())
def test_killed_and_started_again(undisturbed, tmp_path, arm, kills):
    whole, names, seconds = undisturbed[arm]
    done = 0
    for kill in kills:
        if kill[0] == 'clock': kill = 'clock', kill[1]*seconds
        status, epochs = start(arm, tmp_path, tmp_path/'log', kill)
        assert status == -signal.SIGKILL or (kill[0] == 'clock' and status == 0), 'the process was to be killed'
        assert not epochs or epochs == list(range(done, epochs[-1] + 1)), 'an epoch that a checkpoint holds was trained again'
        checkpoint = folder(arm, tmp_path)/'checkpoint.pt'
        saved = (
            torch.load(checkpoint, weights_only=True)['epoch']
            if checkpoint.exists()
            else 3 * (folder(arm, tmp_path) / 'done.json').exists()
        )
        assert saved >= max([done, *epochs]), 'more than the running epoch was lost'
        done = saved
    assert start(arm, tmp_path, tmp_path/'log') == (0, list(range(done, 3)))
    assert {n: (folder(arm, tmp_path)/n).read_bytes() for n in BYTES} == whole
    assert files(tmp_path) == names


# --- a second process ---

def hold(path, say, wait):
    with fold_lock(path):
        say.set()
        wait.wait()


@pytest.fixture
def holder(tmp_path):
    "Another process that holds the fold's folder"
    say, wait = processes.Event(), processes.Event()
    p = processes.Process(target=hold, args=(folder('none', tmp_path), say, wait))
    p.start()
    assert say.wait(60)
    yield p
    p.kill()
    p.join()


def test_a_second_process_is_told_pid_and_host_and_a_dead_ones_lock_is_free_at_once(tmp_path, holder):
    with pytest.raises(
        DataError,
        match=f'fold0 is being trained by process {holder.pid} on {socket.gethostname()}: wait for it, or stop it',
    ) as e:
        train_fold(config('none', tmp_path), bar=False)
    assert '\n' not in str(e.value) and sorted(os.listdir(folder('none', tmp_path))) == ['lock', 'lock.holder']
    holder.kill()
    holder.join()
    assert (folder('none', tmp_path)/'lock').exists()
    with fold_lock(folder('none', tmp_path)):
        assert (folder('none', tmp_path) / 'lock.holder').read_text().startswith(f'process {os.getpid()} on')
    assert os.listdir(folder('none', tmp_path)) == []


def without_locks(monkeypatch):
    def flock(*args): raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, 'flock', flock)


def test_without_locks_the_name_in_the_file_decides(tmp_path, monkeypatch, holder):
    without_locks(monkeypatch)
    path = folder('none', tmp_path)
    with pytest.raises(
        DataError, match=f'seems to be trained by process {holder.pid} on .*no locks.*remove .*lock'
    ) as e:
        fold_lock(path).__enter__()
    assert '\n' not in str(e.value)
    holder.kill()
    holder.join()
    with fold_lock(path): pass
    assert os.listdir(path) == []
    (path/'lock.holder').write_text('process 1 on some-other-host')
    with pytest.raises(DataError, match='process 1 on some-other-host'): fold_lock(path).__enter__()
    (path/'lock.holder').write_text('')
    with fold_lock(path): pass
    assert train_fold(config('none', tmp_path) | dict(epochs=1), bar=False).path == path


def test_without_locks_a_cache_is_made_and_nobody_is_waited_for(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    Image.fromarray(np.full((9, 9), 7, np.uint8)).save(tmp_path/'a.png')
    pixels = PixelCache(pd.DataFrame(dict(image=['a.png'])), tmp_path, 8, cache_dir=tmp_path/'cache', progress=False)
    assert (np.asarray(pixels) == 7).all()
    (tmp_path/'lock').write_text('process 1 on some-other-host')
    assert engines._wait_for(tmp_path, 5) is None


def test_one_at_a_time_whatever_the_hurry(tmp_path):
    "Locks are taken and given back as fast as can be: never are two inside"
    inside, taken, wrong = [], [], []
    def hurry():
        end = time.monotonic() + 10
        while len(taken) < 500 and time.monotonic() < end:
            try:
                with fold_lock(tmp_path):
                    inside.append(1)
                    if len(inside) > 1: wrong.append(1)
                    taken.append(1)
                    time.sleep(0)
                    inside.pop()
            except DataError:
                pass
    threads = [threading.Thread(target=hurry) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong and len(taken) >= 100 and os.listdir(tmp_path) == []


def test_what_is_left_of_a_killed_writer_of_folds_is_cleared(tmp_path):
    (tmp_path / 't').mkdir()
    (tmp_path / 't' / 'folds.csv.tmp-1').write_text('half')
    result = train_fold(config('none', tmp_path) | dict(epochs=1), bar=False)
    assert {p.name for p in (tmp_path / 't').iterdir()} == {'folds.csv', 'none'} and json.loads(
        (result.path / 'done.json').read_text()
    )['epochs'] == 1
