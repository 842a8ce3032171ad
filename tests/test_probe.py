"The linear probe that a pair head starts from: a fresh one, or that of a reward model."
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from underdog.data.metrics import log_loss
from underdog.data.folds import swap_probs
from underdog.model.head import make_head
from underdog.model.settings import ModelConfig
from underdog.training import probe
from underdog.training.probe import fit_probe, start_from_probe
from underdog.data.answers import davidson

TIE = torch.tensor(0., dtype=torch.float64)


def draw(n=500, h=20, strength=.6, n_classes=3, seed=0):
    "(differences, labels, true probabilities) of a law that is linear in the differences."
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
    fitted = fit_probe(x[:600], y[:600], tie=tie)
    held, loss = log_loss(y[600:], predict(x[600:], fitted.weights, fitted.tie)), fitted.loss
    prior = log_loss(y[600:], np.tile(y.mean(0), (300, 1)))
    assert held < prior - .6*(prior - log_loss(y[600:], p[600:])) and abs(held - loss) < .1


def test_exchanged_rows_give_the_same_probe():
    x, y, _ = draw()
    means = np.random.default_rng(2).normal(size=x.shape)
    one, other = (fit_probe(sign*x, labels, means, tie=TIE) for sign, labels in ((1, y), (-1, swap_probs(y))))
    np.testing.assert_allclose(one.weights, other.weights, atol=1e-3)
    np.testing.assert_allclose(one.tie_weights, other.tie_weights, atol=1e-3)
    assert one.ridges == other.ridges and one.loss == pytest.approx(other.loss, abs=1e-4)
    assert float(one.tie) == pytest.approx(float(other.tie), abs=1e-3)


def test_with_the_truth_as_offset_nothing_is_left_to_learn():
    x, y, p = draw(800)
    fitted = fit_probe(x, y, offset=np.log(p), tie=TIE)
    assert float(fitted.tie) == 0 and fitted.loss <= log_loss(y, p) + 1e-9
    assert np.abs(predict(x, fitted.weights, fitted.tie, np.log(p)) - p).max() < .1
    # nor of the ties
    with_means = fit_probe(x, y, np.random.default_rng(2).normal(size=x.shape) + 3, np.log(p), tie=TIE)
    assert with_means.ridges[1] == np.inf and with_means.loss == pytest.approx(fitted.loss)


def test_rows_of_one_prompt_stay_together():
    "Copies of 60 rows with noise for labels look learnable only where copies may stand on both sides."
    x, y, _ = draw(60, h=40)
    y = np.eye(3)[np.random.default_rng(1).integers(3, size=60)]
    copies = np.repeat(np.arange(60), 6)
    apart = fit_probe(x[copies], y[copies], tie=TIE).loss
    together = fit_probe(x[copies], y[copies], tie=TIE, groups=copies).loss
    assert apart < .8 and together > 1.05


def test_one_prompt_teaches_the_tie_alone():
    x, y, _ = draw(30)
    fitted = fit_probe(x, y, x**2, tie=TIE, groups=np.zeros(30))
    assert not fitted.weights.any() and not fitted.tie_weights.any() and np.isfinite(float(fitted.tie))
    assert fitted.ridges == (np.inf, np.inf)


# ---- ties by row
def ties_by_row(n=600, h=12, strength=.6, seed=0):
    "(features (n, 2, h), labels) of a law in which the means of both answers say which rows tie."
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 2, h)) + 2*rng.normal(size=h)   # far from 0, as hidden states are
    s = (features[:, 0] - features[:, 1]) @ rng.normal(size=h)*.3
    means = features.mean(1)
    p = davidson(s/2, -s/2, (means - means.mean(0)) @ rng.normal(size=h)*strength*2**.5 - .3)
    return features, np.eye(3)[[rng.choice(3, p=q) for q in p]]


@pytest.mark.parametrize('offset', [False, True])
def test_which_rows_tie_is_found_where_the_features_tell(offset):
    features, y = ties_by_row()
    x, means, log_prior = features[:, 0] - features[:, 1], features.mean(1), np.log(np.tile(y.mean(0), (len(y), 1)))
    options = dict(tie=TIE, offset=log_prior if offset else None)
    one_tie, by_row = fit_probe(x, y, **options), fit_probe(x, y, means, **options)
    assert by_row.loss < one_tie.loss - .05 and by_row.ridges[1] < 1
    # of other rows they tell nothing, and nothing is taken for that
    of_others = fit_probe(x, y, means[::-1].copy(), **options)
    assert of_others.ridges[1] == np.inf and not of_others.tie_weights.any()


def stand_in(features, y, head, source='seeded', offset=None):
    "(a model whose `features` of rows are these, its `FitData`)."
    def batch(shown):
        rows = torch.tensor([row for row, _ in shown])
        out = SimpleNamespace(rows=rows)
        out.to = lambda device: out
        return out
    x = torch.tensor(features, dtype=torch.float32)
    data = SimpleNamespace(
        source=SimpleNamespace(
            head='pair', lengths=np.ones(len(y)), bins=lambda rows, budget, orders: [rows], batch=batch),
        y=y, offset=offset, train=np.arange(len(y)))
    model = SimpleNamespace(
        head=head, head_source=source, training=False, eval=lambda: None, train=lambda on: None,
        features=lambda batch: torch.cat([x[batch.rows, 0], x[batch.rows, 1]]))
    return model, data


@pytest.mark.parametrize('n_classes', [2, 3])
def test_the_head_predicts_what_the_probe_has_fitted(n_classes):
    features, y = ties_by_row()
    y = y[:, :n_classes] + 1e-9
    y /= y.sum(1, keepdims=True)
    head = make_head(ModelConfig('', n_classes=n_classes), features.shape[2])
    model, data = stand_in(features, y, head)
    line = start_from_probe(model, data, np.arange(len(y)), 2000)
    with torch.no_grad():
        p = head(torch.cat([torch.tensor(features[:, i], dtype=torch.float32) for i in (0, 1)])).softmax(-1).numpy()
    told = float(line.split('log loss ')[1].split(',')[0])
    assert told - .08 < log_loss(y, p) < told and 'on 600 rows' in line
    assert ('of ties' in line) == (n_classes == 3)


# ---- the head of a reward model
@pytest.mark.parametrize('offset', [False, True])
def test_a_reward_model_gets_a_scale_and_a_tie(offset, monkeypatch):
    "Its logits are (s r_A, s r_B, their mean + tie); what it is worth is told, alone and with the baseline."
    monkeypatch.setattr(probe, '_FEW', 600)
    rng = np.random.default_rng(0)
    head = make_head(ModelConfig(''), 16)
    head.score.weight.data.normal_()
    features = rng.normal(size=(900, 2, 16))
    row = head.score.weight.detach().double().numpy()[0]
    reward = features @ row
    p = davidson(*(.3*reward).T, -.4)
    y = np.eye(3)[[rng.choice(3, p=q) for q in p]]
    log_prior = np.log(np.tile(y.mean(0), (900, 1)))
    model, data = stand_in(features, y, head, 'checkpoint', log_prior if offset else None)
    line = start_from_probe(model, data, np.arange(900), 2000)
    # the row is the same but for its scale
    scale = head.score.weight.detach().numpy()[0]/row
    assert np.ptp(scale) < 1e-6 and scale[0] == pytest.approx(.3, abs=.1) and not head.tie_score.weight.any()
    assert head.tie.item() == pytest.approx(0 if offset else -.4, abs=.2)
    with torch.no_grad(): z = head(torch.tensor(np.concatenate([features[:, 0], features[:, 1]]), dtype=torch.float32))
    s = scale[0]*reward
    np.testing.assert_allclose(z, np.stack([*s.T, s.mean(1) + head.tie.item()], 1), atol=1e-4)
    # what is told
    assert 'on 600 rows' in line and ('baseline alone' in line) == offset
    assert abs(float(line.split('training ')[1].split()[0]) - log_loss(y, p)) < .05
