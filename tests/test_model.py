"Weights from a file: taken whole, or refused in one line"
import pytest
import timm
import torch
from safetensors.torch import save_file

from cxrlg.core import DataError
from cxrlg.model import CXRNet


def weights_of(change=lambda state: state):
    state = timm.create_model('test_resnet').state_dict()
    return change(state)


def load(tmp_path, state):
    torch.save(state, tmp_path/'w.pth')
    return CXRNet('test_resnet', ['a', 'b'], weights=str(tmp_path/'w.pth'))


@pytest.mark.parametrize(
    'wrap',
    [lambda s: s, lambda s: dict(state_dict=s), lambda s: dict(epoch=3, model=s)],
    ids=['bare', 'state_dict', 'model'],
)
def test_the_same_weights_however_they_are_wrapped(tmp_path, wrap):
    state = weights_of()
    net = load(tmp_path, wrap(state)).backbone.state_dict()
    first, last = (f'{timm.create_model("test_resnet").pretrained_cfg[part]}.' for part in ('first_conv', 'classifier'))
    for k, v in state.items():
        if not k.startswith((first, last)): assert torch.equal(net[k], v), k


def test_a_classifier_of_other_classes_and_none_at_all_are_taken(tmp_path):
    last = timm.create_model('test_resnet').pretrained_cfg['classifier']
    for change in (lambda v: v[:5], None):
        state = {
            k: (change(v) if change and k.startswith(last) else v)
            for k, v in weights_of().items()
            if change or not k.startswith(last)
        }
        assert load(tmp_path, state).labels == ['a', 'b']


REFUSED = {
    'half of the layers': (
        lambda s: {k: v for k, v in s.items() if not k.startswith(('layer3', 'layer4'))},
        'are not in the file, or of another shape .first: layer3',
    ),
    'one tensor': (
        lambda s: {k: v for k, v in s.items() if k != 'layer1.0.bn1.bias'},
        '1 of the .* .first: layer1.0.bn1.bias',
    ),
    'another shape': (lambda s: s | {'layer1.0.bn1.bias': torch.zeros(3)}, '1 of the .* of another shape'),
    'no tensors': (lambda s: dict(epoch=3, lr=0.1), 'holds no named tensors'),
    'a list': (lambda s: list(s.values()), 'holds no named tensors'),
    'nothing': (lambda s: {}, 'holds no named tensors'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, name):
    change, says = REFUSED[name]
    with pytest.raises(DataError, match=says) as e: load(tmp_path, weights_of(change))
    assert '\n' not in str(e.value)


def test_a_safetensors_file(tmp_path):
    save_file(weights_of(), tmp_path/'w.safetensors')
    assert CXRNet('test_resnet', ['a'], weights=str(tmp_path/'w.safetensors')).labels == ['a']
