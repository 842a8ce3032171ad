"""Does the plan come true? A calibration of a few steps beside the real training, for three shapes of model, on this machine.

    python -m benchmarks.plan [--rows 400] [--steps 8] [--shapes deep,wide,encoder]

Each training is run twice in fresh processes: `calibrate` (start, rehearsal, a few steps spread over the sizes) and `train` to the end. Compared are the seconds of the training loop with its evaluations and the peak of resident memory. `published` is the plan for runs
that others reported, with the default efficiency, over their hours. The last line is JSON.
"""
import argparse
import os
import tempfile
from pathlib import Path

os.environ.update(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1')

from benchmarks.common import last_line, table   # noqa: E402

SHAPES = dict(deep=dict(hidden_size=128, intermediate_size=384, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2), wide=dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=8),
              encoder=dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4))


def make_model(name, folder):
    "Write a backbone with random weights of that shape, and a tokenizer trained on generated text."
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    from benchmarks.data import make_tokenizer
    torch.manual_seed(0)
    more = dict(vocab_size=8000, max_position_embeddings=2048)
    (BertModel(BertConfig(**SHAPES[name], **more)) if name == 'encoder' else LlamaModel(LlamaConfig(**SHAPES[name], **more))).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def measure(name, train_csv, folder, steps):
    "(calibration, seconds, GB) of one shape."
    from underdog.search.calibrate import calibrate
    from underdog.session import SessionConfig
    from underdog.training.run import train
    from underdog.model.model import ModelConfig
    from underdog.text.prompt import PromptConfig
    from underdog.training.settings import TrainConfig
    base = str(make_model(name, folder/name))
    model, prompt, cfg = (ModelConfig(base, rank=8, alpha=8., quantization='none'), PromptConfig(max_length=256), TrainConfig(n_folds=5, batch_rows=16, batch_tokens=2048, probe_rows=0))
    calibrated = calibrate(train_csv, model, prompt, cfg=cfg, steps=steps)
    run = train(train_csv, model, folder/f'{name}-run', prompt, cfg=cfg, session=SessionConfig(processes=1))
    return calibrated, run.status['elapsed_s'], float(run.metrics()['memory_gb'].dropna().max())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=400, help='rows of the training file')
    parser.add_argument('--steps', type=int, default=8, help='that the calibration times')
    parser.add_argument('--shapes', default=','.join(SHAPES), help='which models')
    args = parser.parse_args()
    from underdog.machine import quiet
    from underdog.search.estimate import PUBLISHED, implied
    from underdog.data.sample import write_sample
    quiet()
    found, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        os.environ['UNDERDOG_CACHE'] = f'{folder}/cache'
        train_csv = write_sample(Path(folder)/'data', args.rows, 20)['train.csv']
        for name in args.shapes.split(','):
            c, seconds, memory = measure(name, train_csv, Path(folder), args.steps)
            found[name] = dict(time_error=c.seconds/seconds - 1, memory_error=c.memory_gb/memory - 1)
            rows.append((name, f'{c.seconds:.1f}', f'{seconds:.1f}', f"{found[name]['time_error']:+.1%}", f'{c.memory_gb:.3f}', f'{memory:.3f}', f"{found[name]['memory_error']:+.1%}"))
    table('calibration and reality', ('shape', 'predicted s', 'real s', 'error', 'predicted GB', 'real GB', 'error'), rows)
    published = {e[0]: round(implied(e)[2], 2) for e in PUBLISHED}
    table('what others reported', ('published run', 'reported h', 'TFLOP/s a card', 'efficiency', 'predicted / reported'), [(e[0], f'{e[5]:g}', *(f'{x:.2f}' for x in implied(e))) for e in PUBLISHED])
    last_line(dict(time_error=max((f['time_error'] for f in found.values()), key=abs), memory_error=max((f['memory_error'] for f in found.values()), key=abs), shapes=found, published=published, rows=args.rows, steps=args.steps))


if __name__ == '__main__': main()
