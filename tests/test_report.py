"Figures are drawn and the page is self-contained."
import numpy as np
import pandas as pd

from underdog.console.report import calibration_error, figure_png, plot_calibration, plot_confusion, plot_lengths, plot_loss, plot_probabilities, plot_scores, write_report


def test_calibration_error_is_small_for_the_law_and_large_for_the_overconfident():
    rng = np.random.default_rng(0)
    p = rng.dirichlet([2, 2, 1], 4000)
    y = np.eye(3)[[rng.choice(3, p=t) for t in p]]
    sharp = p**4/(p**4).sum(1, keepdims=True)
    assert calibration_error(y, p) < .03 < calibration_error(y, sharp)


def test_every_figure_draws_even_with_little_data(tmp_path):
    y, p = np.eye(3)[[0]], np.array([[.5, .3, .2]])
    metrics = pd.DataFrame([dict(step=1, loss=1.1), dict(step=1, eval_loss=1.0)])
    figures = [plot_lengths([5]), plot_lengths(np.arange(1, 300), 100), plot_loss(metrics, dict(prior=1.09), .9), plot_loss(metrics[['step', 'loss']]), plot_calibration(y, p), plot_confusion(y, p),
               plot_probabilities(pd.DataFrame(p, columns=['p_a', 'p_b', 'p_tie'])), plot_scores(pd.DataFrame(dict(name=['x'], loss=[1.], low=[.9], high=[1.1])), .8)]
    assert all(figure_png(f)[:4] == b'\x89PNG' and len(figure_png(f)) > 3000 for f in figures)
    page = write_report(tmp_path/'r.html', 'a <b>', [('x & y', [figures[0], pd.DataFrame({'<i>': ['<script>']}), 'text\nlines'])]).read_text()
    assert '<script>' not in page and 'http' not in page and page.count('data:image/png;base64,') == 1 and list(tmp_path.iterdir()) == [tmp_path/'r.html']
