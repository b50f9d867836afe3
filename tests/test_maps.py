"Class-activation maps: their mean is the logit, they are Grad-CAM's, and networks of another kind have none."
import numpy as np
import pytest
import torch

import cxrlg.maps as room
from cxrlg.core import DataError
from cxrlg.maps import batch_size, class_maps, mean_maps, plot_map
from cxrlg.model import CXRNet, load_model
from small_studies import LABELS, one_line, one_thread, study


@pytest.mark.parametrize(
    'arch, size',
    [
        ('test_resnet', 64),
        ('densenet121', 64),
        ('efficientnet_lite0', 64),
        ('seresnext26d_32x4d', 64),
        ('test_resnet', 50),
    ],
)
def test_the_mean_of_a_map_is_the_logit_without_the_bias(arch, size):
    torch.manual_seed(0)
    model = CXRNet(arch, LABELS).eval()
    x = torch.rand(2, 1, size, size)
    maps, z = class_maps(model, x), model.logits(x)
    assert maps.ndim == 4 and maps.shape[:2] == (2, 3)
    torch.testing.assert_close(maps.mean((2, 3)) + model.backbone.get_classifier().bias, z.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('arch', ['test_vit', 'mobilenetv3_small_050', 'test_convnext'])
def test_other_heads_have_no_map(arch):
    with pytest.raises(DataError, match=f'{arch} does not end in') as e: class_maps(CXRNet(arch, LABELS).eval(), torch.rand(1, 1, 160, 160))
    assert one_line(e)


@pytest.mark.parametrize('arch', ['test_resnet', 'seresnext26d_32x4d', 'efficientnet_lite0', 'densenet121'])
def test_a_map_is_grad_cam(arch):
    torch.manual_seed(1)
    model = CXRNet(arch, LABELS).eval()
    x = torch.rand(1, 1, 96, 96)
    maps = class_maps(model, x)
    for j in range(3):
        f = model.backbone.forward_features((x - model.mean) / model.std).detach().requires_grad_()
        grad, = torch.autograd.grad(model.backbone.forward_head(f)[0, j], f)
        grad_cam = (grad.sum((2, 3), keepdim=True) * f).sum(1)[0].detach()
        torch.testing.assert_close(grad_cam, maps[0, j].clone(), atol=1e-5, rtol=1e-4)


def test_the_mean_over_models_and_mirror_images(study):
    models = [load_model(study/f'none/seed42/fold{k}') for k in range(2)]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    x = torch.from_numpy(pixels)[:, None] / 255
    both = [class_maps(m, x) for m in models] + [class_maps(m, x.flip(-1)).flip(-1) for m in models]
    for bs in (1, 3, 64): np.testing.assert_allclose(mean_maps(models, pixels, bs), torch.stack(both).mean(0), atol=1e-5)


def test_large_films_go_in_small_batches(monkeypatch):
    assert (batch_size(64, 64), batch_size(8, 224), batch_size(64, 1024), batch_size(64, 4096)) == (64, 8, 2, 1)
    monkeypatch.setattr(room, '_BATCH_PIXELS', 3*32*32)
    assert batch_size(64, 32) == 3


def test_plot_map_shows_nothing_where_a_map_is_negative():
    film = np.full((8, 8), 100, np.uint8)
    assert len(plot_map(film, -np.ones((8, 8))).images) == len(plot_map(film, None).images) == 1
    heat = np.zeros((8, 8))
    heat[2, 3], heat[4, 4] = 5, -5
    over = plot_map(film, heat, 'title').images[1].get_array()
    assert over[2, 3, 3] > .5 and over[..., 3].sum() == over[2, 3, 3]
