"Figures are drawn and the page is self-contained."
import numpy as np
import pandas as pd

from underdog.console.figures import (calibration_error, figure_png, plot_calibration, plot_confusion, plot_intervals,
                                      plot_lengths, plot_loss, plot_probabilities, save_figure)
from underdog.console.judge import Finding
from underdog.console.report import run_figures, write_report
from underdog.core import write_json
from underdog.data.competition import LMSYS
from underdog.data.metrics import Margin
from underdog.runfolder import RunFolder


def test_calibration_error_is_small_for_the_law_and_large_for_the_overconfident():
    rng = np.random.default_rng(0)
    p = rng.dirichlet([2, 2, 1], 4000)
    y = np.eye(3)[[rng.choice(3, p=t) for t in p]]
    sharp = p**4/(p**4).sum(1, keepdims=True)
    assert calibration_error(y, p) < .03 < calibration_error(y, sharp)


def test_every_figure_draws_even_with_little_data(tmp_path):
    y, p = np.eye(3)[[0]], np.array([[.5, .3, .2]])
    metrics = pd.DataFrame([dict(step=1, loss=1.1), dict(step=1, eval_loss=1.0)])
    scores = pd.DataFrame(dict(name=['x'], loss=[1.], low=[.9], high=[1.1]))
    figures = [
        plot_lengths([5]),
        plot_lengths(np.arange(1, 300), 100),
        plot_loss(metrics, dict(prior=1.09), .9),
        plot_loss(metrics[['step', 'loss']]),
        plot_calibration(y, p),
        plot_confusion(y, p),
        plot_probabilities(pd.DataFrame(p, columns=['p_a', 'p_b', 'p_tie'])),
        plot_intervals(scores, .8),
    ]
    for figure in figures:
        png = figure_png(figure)
        assert png[:4] == b'\x89PNG' and len(png) > 3000
    save_figure(figures[0], tmp_path/'figures'/'lengths.png')
    assert (tmp_path/'figures'/'lengths.png').read_bytes()[:4] == b'\x89PNG'



def test_no_legend_hides_the_last_evaluation():
    metrics = pd.DataFrame(dict(step=range(1, 41), loss=.8, eval_loss=[None]*39 + [1.05], eval_rows=[None]*39 + [225]))
    figure = plot_loss(metrics, dict(prior=1.0663, traits=1.0517))
    figure.canvas.draw()
    axes, = figure.axes
    hidden, plot = axes.get_legend().get_window_extent(), axes.get_window_extent()
    assert not hidden.contains(*axes.transData.transform((40, 1.05))) and not plot.fully_overlaps(hidden)
    assert hidden.x1 < figure.bbox.x1 and hidden.y1 < figure.bbox.y1 + 1   # a pixel


def test_the_page_is_one_file_and_its_texts_are_no_markup(tmp_path):
    table = pd.DataFrame({'<i>': ['<script>']})
    items = [plot_lengths([5]), table, 'text\nlines']
    page = write_report(tmp_path/'r.html', 'a <b>', [('x & y', items)]).read_text()
    assert '<script>' not in page and 'http' not in page
    assert page.count('data:image/png;base64,') == 1 and list(tmp_path.iterdir()) == [tmp_path/'r.html']


def test_a_run_shows_what_there_is_of_it(finished, tmp_path):
    assert list(run_figures(finished, LMSYS)) == ['Lengths', 'Loss', 'Calibration', 'Confusion']
    # stopped before its first step
    finished.copy_to(tmp_path/'run')
    run = RunFolder(tmp_path/'run')
    write_json(run.config_file, finished.config)
    for file in (run.metrics_file, run.oof_file): file.unlink()
    assert list(run_figures(run, LMSYS)) == ['Lengths']


def test_what_is_to_be_typed_looks_so_and_only_wide_figures_are_moved_sideways(tmp_path):
    said = [Finding('flat', 'more rows; `underdog scale` tells what they bring'), '`a < b` holds', 'a\n`b`']
    y, p = np.eye(3)[[0]], np.array([[.5, .3, .2]])
    page = write_report(tmp_path/'r.html', 'x', [('x', [*said, plot_lengths([5]), plot_confusion(y, p)])]).read_text()
    assert '<code>underdog scale</code>' in page and '<code>a &lt; b</code>' in page and '<pre>a\n`b`</pre>' in page
    assert page.count('class="figure wide"') == page.count('class="figure"') == 1
    assert '  .wide img' in page.split('max-width: 30rem')[1].split('@media')[0]


def test_nothing_is_less_than_zero_to_four_digits():
    assert '+0.0000 [+0.0000, +0.0000]' in str(Margin('stack', -1e-9, -4e-5, -0.))
    assert '-0.0001 [-0.0002, +0.0001]' in str(Margin('stack', -.0001, -.0002, .0001))
