"""Does the plan come true? A calibration of a few steps beside the real training, for three shapes of model.

    python -m benchmarks.plan [--rows 400] [--steps 8] [--shapes deep,wide,encoder]

Each training is run twice in fresh processes on this machine: `calibrate` (start, rehearsal, a few steps spread over
the sizes) and `train` to the end. Compared are the seconds of the training loop with its evaluations and the peak of
resident memory. `published` is the plan for runs that others reported, with the default efficiency, over their hours.
The last line of output is JSON.
"""
import argparse
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ.update(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1')

from benchmarks.common import last_line, save_model, table   # noqa: E402

SHAPES = dict(
    deep=dict(hidden_size=128, intermediate_size=384, num_hidden_layers=12,
              num_attention_heads=4, num_key_value_heads=2),
    wide=dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=3,
              num_attention_heads=8, num_key_value_heads=8),
    encoder=dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4),
)


def make_model(name, folder):
    "A backbone of the shape `name` with random weights in `folder`, and a tokenizer trained on generated text."
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    from benchmarks.data import make_tokenizer
    model_class, config_class = (BertModel, BertConfig) if name == 'encoder' else (LlamaModel, LlamaConfig)
    save_model(folder, model_class, config_class(**SHAPES[name], vocab_size=8000, max_position_embeddings=2048))
    make_tokenizer(folder)
    return str(folder)


class Measured(NamedTuple):
    "Seconds of the training loop and GB of memory, predicted and real."
    predicted_s: float
    real_s: float
    predicted_gb: float
    real_gb: float

    @property
    def errors(self):
        "Relative errors of the prediction."
        return dict(time_error=self.predicted_s/self.real_s - 1, memory_error=self.predicted_gb/self.real_gb - 1)


def measure(name, train_csv, folder, steps):
    "The `Measured` of one shape."
    from underdog.search.calibrate import calibrate
    from underdog.session import SessionConfig
    from underdog.training.run import train
    from underdog.model.settings import ModelConfig
    from underdog.text.prompt import PromptConfig
    from underdog.training.settings import TrainConfig
    model = ModelConfig(make_model(name, folder/name), rank=8, alpha=8., quantization='none')
    prompt = PromptConfig(max_length=256)
    cfg = TrainConfig(n_folds=5, batch_rows=16, batch_tokens=2048, probe_rows=0)
    # predicted, then real
    calibrated = calibrate(train_csv, model, prompt, cfg=cfg, steps=steps)
    run = train(train_csv, model, folder/f'{name}-run', prompt, cfg=cfg, session=SessionConfig(processes=1))
    memory_gb = float(run.metrics()['memory_gb'].dropna().max())
    return Measured(calibrated.seconds, run.status['elapsed_s'], calibrated.memory_gb, memory_gb)


def show(name, measured):
    "The row of the table for one shape."
    errors = measured.errors
    return (name, f'{measured.predicted_s:.1f}', f'{measured.real_s:.1f}', f"{errors['time_error']:+.1%}",
            f'{measured.predicted_gb:.3f}', f'{measured.real_gb:.3f}', f"{errors['memory_error']:+.1%}")


def compare_published():
    "Print the plan beside what others reported; {run: predicted hours over reported ones}."
    from underdog.search.estimate import PUBLISHED, implied
    rows, published = [], {}
    for entry in PUBLISHED:
        what, reported_hours = entry[0], entry[5]
        rate, efficiency, predicted_over_reported = implied(entry)
        rows.append((what, f'{reported_hours:g}', f'{rate:.2f}', f'{efficiency:.2f}', f'{predicted_over_reported:.2f}'))
        published[what] = round(predicted_over_reported, 2)
    columns = ('published run', 'reported h', 'TFLOP/s a card', 'efficiency', 'predicted / reported')
    table('what others reported', columns, rows)
    return published


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=400, help='rows of the training file')
    parser.add_argument('--steps', type=int, default=8, help='that the calibration times')
    parser.add_argument('--shapes', default=','.join(SHAPES), help='which models')
    args = parser.parse_args()
    from underdog.machine import quiet
    from underdog.data.sample import write_sample
    quiet()
    # every shape, calibrated and trained
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ['UNDERDOG_CACHE'] = f'{folder}/cache'
        train_csv = write_sample(Path(folder)/'data', args.rows, 20)['train.csv']
        for name in args.shapes.split(','): measured[name] = measure(name, train_csv, Path(folder), args.steps)
    # figures
    columns = ('shape', 'predicted s', 'real s', 'error', 'predicted GB', 'real GB', 'error')
    table('calibration and reality', columns, [show(name, m) for name, m in measured.items()])
    published = compare_published()
    shapes = {name: m.errors for name, m in measured.items()}
    largest = {key: max((errors[key] for errors in shapes.values()), key=abs) for key in ('time_error', 'memory_error')}
    last_line(dict(**largest, shapes=shapes, published=published, rows=args.rows, steps=args.steps))


if __name__ == '__main__': main()
