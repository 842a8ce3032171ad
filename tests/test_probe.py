"The linear probe that a fresh pair head starts from."
import numpy as np
import pytest
import torch

from underdog.data.metrics import log_loss
from underdog.data.folds import swap_probs
from underdog.training.probe import fit_probe
from underdog.data.answers import davidson

TIE = torch.tensor(0., dtype=torch.float64)


def draw(n=500, h=20, strength=.6, n_classes=3, seed=0):
    "(differences, labels, true probabilities) of a law that is linear in the features."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, h))*rng.uniform(.1, 5, h)   # scales differ, as those of hidden units do
    s = (x/x.std(0)) @ (rng.normal(size=h)*strength)
    p = davidson(s/2, -s/2)[:, :n_classes]
    p /= p.sum(1, keepdims=True)
    return x, np.eye(n_classes)[[rng.choice(n_classes, p=q) for q in p]], p


def predict(x, w, tie, offset=0.):
    s = x @ w.double().numpy()
    z = np.stack([s/2, -s/2] + ([] if tie is None else [s*0 + float(tie)]), -1) + offset
    return np.exp(z)/np.exp(z).sum(1, keepdims=True)


@pytest.mark.parametrize('n_classes', [2, 3])
def test_it_finds_a_linear_law_and_says_how_well(n_classes):
    tie = TIE if n_classes == 3 else None
    x, y, p = draw(900, n_classes=n_classes)
    w, found, _, loss = fit_probe(x[:600], y[:600], tie=tie)
    held = log_loss(y[600:], predict(x[600:], w, found))
    prior = log_loss(y[600:], np.tile(y.mean(0), (300, 1)))
    assert held < prior - .6*(prior - log_loss(y[600:], p[600:])) and abs(held - loss) < .1


def test_exchanged_rows_give_the_same_probe():
    x, y, _ = draw()
    (w, tie, ridge, loss), (v, t, r, m) = fit_probe(x, y, tie=TIE), fit_probe(-x, swap_probs(y), tie=TIE)
    np.testing.assert_allclose(w, v, atol=1e-3)
    assert ridge == r and loss == pytest.approx(m, abs=1e-4) and float(tie) == pytest.approx(float(t), abs=1e-3)


def test_with_the_truth_as_offset_nothing_is_left_to_learn():
    x, y, p = draw(800)
    w, tie, _, loss = fit_probe(x, y, np.log(p), tie=TIE)
    assert float(tie) == 0 and loss <= log_loss(y, p) + 1e-9
    assert np.abs(predict(x, w, tie, np.log(p)) - p).max() < .1


def test_rows_of_one_prompt_stay_together():
    "Copies of 60 rows with noise for labels look learnable only where copies may stand on both sides."
    x, y, _ = draw(60, h=40)
    y = np.eye(3)[np.random.default_rng(1).integers(3, size=60)]
    copies = np.repeat(np.arange(60), 6)
    apart = fit_probe(x[copies], y[copies], tie=TIE)[3]
    together = fit_probe(x[copies], y[copies], tie=TIE, groups=copies)[3]
    assert apart < .8 and together > 1.05


def test_one_prompt_teaches_the_tie_alone():
    x, y, _ = draw(30)
    w, tie, ridge, _ = fit_probe(x, y, tie=TIE, groups=np.zeros(30))
    assert not w.any() and ridge == np.inf and np.isfinite(float(tie))
