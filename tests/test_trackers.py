"A fold is tracked: the rows of its history in local files, and not one byte of its results is another."
import importlib.util
import sys

import numpy as np
import pytest

from cxrlg.callbacks import Checkpoint
from cxrlg.config import TrainConfig
from cxrlg.core import DataError
from cxrlg.train import is_done, train_fold
from cxrlg.trackers import Tracker

SMALL = dict(data_args={'n_patients': 60}, n_splits=2, size=32, arch='test_resnet', epochs=2, bs=16, amp='no', threads=1)
RESULTS = 'model.safetensors', 'oof.parquet'


def needs(tracker):
    if importlib.util.find_spec(tracker) is None: pytest.skip(f"{tracker} is not installed: pip install 'cxrlg[{tracker}]'")


def fold(folder, **options): return train_fold(SMALL | dict(out_dir=str(folder)) | options, bar=False)


def bytes_of(result): return [(result.path/name).read_bytes() for name in RESULTS]


@pytest.fixture(scope='module')
def plain(tmp_path_factory): return fold(tmp_path_factory.mktemp('plain'))


def tensorboard_rows(path):
    "Tag -> step -> value of event files"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(path)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()['scalars']}


def mlflow_rows(path):
    "The same of MLflow's store of files"
    files = [f for f in path.glob('*/*/metrics/*') if f.is_file()]
    lines = {f.name: [line.split() for line in f.read_text().splitlines()] for f in files}
    return {tag: {int(step): float(value) for _, value, step, *_ in rows} for tag, rows in lines.items()}


READERS = dict(tensorboard=tensorboard_rows, mlflow=mlflow_rows)


def check_rows(found, history):
    "Every finite number of the history, and no other"
    for tag in set(history) - {'epoch'}:
        expected = {int(e): v for e, v in zip(history.epoch, history[tag]) if np.isfinite(v)}
        assert found[tag].keys() == expected.keys(), tag
        np.testing.assert_allclose(list(found[tag].values()), list(expected.values()), rtol=1e-6)
    assert set(found) == set(history) - {'epoch'}


@pytest.mark.parametrize('track', READERS)
def test_the_history_is_tracked_and_the_bytes_are_the_same(plain, tmp_path, track):
    needs(track)
    tracked = fold(tmp_path, track=track)
    assert bytes_of(tracked) == bytes_of(plain)
    check_rows(READERS[track](tracked.path/'track'/track), tracked.history)


def test_wandb_writes_an_offline_run(plain, tmp_path):
    needs('wandb')
    tracked = fold(tmp_path, track='wandb')
    assert bytes_of(tracked) == bytes_of(plain)
    assert len(list((tracked.path/'track'/'wandb').rglob('run-*.wandb'))) == 1


def test_a_resumed_fold_has_one_whole_run(plain, tmp_path, monkeypatch):
    needs('tensorboard')
    real = Checkpoint.after_epoch

    def die(self):
        real(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Checkpoint, 'after_epoch', die)
        with pytest.raises(KeyboardInterrupt): fold(tmp_path, track='tensorboard')
    resumed = fold(tmp_path, track='tensorboard')
    assert bytes_of(resumed) == bytes_of(plain)
    check_rows(tensorboard_rows(resumed.path/'track'/'tensorboard'), resumed.history)
    assert resumed.history.epoch.tolist() == [1, 2]


def test_a_finished_fold_stays_finished(plain):
    cfg = TrainConfig(**SMALL | dict(out_dir=str(plain.path.parents[3])))
    assert is_done(cfg)
    for change in (dict(track='mlflow'), dict(grad_checkpoint=True)):
        other = TrainConfig(**SMALL | dict(out_dir=cfg.out_dir) | change)
        assert other.hash == cfg.hash and is_done(other)


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *more: None if name == 'mlflow' else real(name, *more))
    with pytest.raises(DataError) as e: fold(tmp_path, track='mlflow')
    assert str(e.value) == "track=mlflow needs the package mlflow: pip install 'cxrlg[mlflow]', or set track to nothing"
    assert not list(tmp_path.rglob('done.json'))
    with pytest.raises(DataError, match="use one of '', tensorboard, mlflow, wandb"): TrainConfig(track='neptune')


def test_a_disk_that_is_full_is_one_line(tmp_path, monkeypatch):
    class Full:
        def __init__(self, *about): raise OSError(28, 'No space left on device')
    monkeypatch.setitem(sys.modules['cxrlg.trackers']._WRITERS, 'json', Full)
    tracker = Tracker('json', tmp_path/'track', 'mine', 'run', {})
    with pytest.raises(DataError, match='free some space'): tracker.before_fit()


def test_every_tracker_has_its_extra():
    import configparser

    from conftest import ROOT
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    setup = (ROOT/'setup.py').read_text()
    for track in ('tensorboard', 'mlflow', 'wandb'):
        assert cfg['DEFAULT'][f'{track}_requirements'].startswith(track) and f"'{track}'" in setup
